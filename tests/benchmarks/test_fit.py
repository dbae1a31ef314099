"""The default fit against the authors' schedule, on one checkpoint, in one run: seconds, ACC, ASR, RA.

The published schedule takes many minutes on two cores. `make bench` prints the table; the ratio is what counts.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import bclip_lab as bl

RESULTS: dict[str, tuple[float, bl.Evaluation]] = {}


@pytest.mark.parametrize("name", ["default", "published"])
def test_fit(benchmark: BenchmarkFixture, name: str) -> None:
    checkpoint = bl.zoo.load("patch")
    splits = checkpoint.splits()
    clipped = bl.ClippedModel(checkpoint.model)
    config = bl.MMACConfig() if name == "default" else bl.MMACConfig.published()
    benchmark.pedantic(lambda: bl.run(bl.mmac(clipped, splits.defender, config)), rounds=1, iterations=1)
    result = bl.evaluate(clipped, splits.test, checkpoint.attack)
    benchmark.extra_info.update(acc=result.acc, asr=result.asr, ra=result.ra)
    seconds = benchmark.stats.stats.mean
    RESULTS[name] = (seconds, result)
    print(f"\n{name}: {seconds:.1f} s, {result}")
    if name == "published" and "default" in RESULTS:
        print(f"published / default: {seconds / RESULTS['default'][0]:.1f} times the seconds")
    assert result.asr < 0.5
