"""bclip_lab.detection: MMDF on images by hand-set bounds, MM-BD on hand-made margins."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import gamma
from torch import Tensor, nn

from bclip_lab.clipping import ClippedModel
from bclip_lab.data.images import LabelledImages
from bclip_lab.detection import MMBD, MMDF
from bclip_lab.margins import MaximumMarginConfig, maximum_margin_images
from bclip_lab.models import resnet

CLASSES = ("cat", "dog", "owl")


def clipped_pixels(bounds: list[float] | None = None) -> ClippedModel:
    """Three pixels are the three logits; the clip is at `bounds`."""
    layers = nn.Linear(3, 3), nn.Linear(3, 3)
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.eye(3))
            layer.bias.zero_()
    clipped = ClippedModel(nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1]))
    if bounds is not None:
        clipped.set_bounds({clipped.sites[0]: torch.tensor(bounds)})
    return clipped


def pixels(*rows: tuple[float, float, float]) -> Tensor:
    return torch.tensor(rows)[:, :, None, None]


def labelled(images: Tensor) -> LabelledImages:
    return LabelledImages(images, torch.zeros(len(images), dtype=torch.int64), CLASSES)


# By a bound of 0.5 on pixel 0 these lose 0.1, 0.2 and 0.3 of their margin, and score so.
CLEAN = labelled(pixels((0.6, 0.1, 0.0), (0.7, 0.1, 0.0), (0.8, 0.1, 0.0)))
HALF = [0.5, torch.inf, torch.inf]


# --- MMDF ---


def test_scores_by_hand() -> None:
    detector = MMDF(clipped_pixels(HALF), scale=1.0).fit(CLEAN)
    images = pixels((0.9, 0.2, 0.1), (0.9, 0.8, 0.1), (0.4, 0.2, 0.1), (0.6, 0.7, 0.1), (0.2, 0.1, 0.9))
    # margins of the original's class 0.7, 0.1, 0.2, 0.1, 0.7; clipped 0.3, -0.3, 0.2, 0.2, 0.7
    expected = torch.tensor([0.4, 0.4, 0.0, -0.1, 0.0])
    torch.testing.assert_close(detector.score(images), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(detector.score(labelled(images)), expected, atol=1e-6, rtol=0)
    bytes_ = (images * 255).round().byte()
    torch.testing.assert_close(detector.score(bytes_), expected, atol=0.01, rtol=0)


def test_the_scale_by_hand() -> None:
    # margins 0.5, 0.6, 0.7, clipped 0.4 each: a = (0.5 + 0.6 + 0.7) 0.4 / (0.25 + 0.36 + 0.49)
    detector = MMDF(clipped_pixels(HALF)).fit(CLEAN)
    assert detector.scale_ == pytest.approx(0.72 / 1.1)
    expected = [margin - 0.4 * 1.1 / 0.72 for margin in (0.5, 0.6, 0.7)]
    assert detector.scores_.tolist() == pytest.approx(expected, abs=1e-6)
    assert detector.score(CLEAN).tolist() == pytest.approx(expected, abs=1e-6)


def test_bounds_that_leave_no_margin_leave_the_scale_at_one() -> None:
    detector = MMDF(clipped_pixels([0.0, 0.0, 0.0])).fit(CLEAN)
    assert detector.scale_ == 1.0
    assert detector.scores_.tolist() == pytest.approx([0.5, 0.6, 0.7], abs=1e-6)


def test_the_gaussian_threshold_by_hand() -> None:
    detector = MMDF(clipped_pixels(HALF), scale=1.0).fit(CLEAN)
    assert detector.scores_.tolist() == pytest.approx([0.1, 0.2, 0.3], abs=1e-6)
    # mean 0.2, standard deviation of a sample (n - 1) 0.1, z = 2.576
    assert detector.threshold_ == pytest.approx(0.2 + 2.5758 * 0.1, abs=1e-5)
    assert detector.threshold(0.05) == pytest.approx(0.2 + 1.6449 * 0.1, abs=1e-5)
    assert MMDF(clipped_pixels(HALF), scale=1.0, fpr=0.05).fit(CLEAN).threshold_ == detector.threshold(0.05)


def test_the_empirical_threshold_by_hand() -> None:
    images = labelled(pixels(*((0.5 + k / 10, 0.0, 0.0) for k in (3, 1, 5, 2, 4))))
    detector = MMDF(clipped_pixels(HALF), scale=1.0, null="empirical", fpr=0.25).fit(images)
    ordered = np.sort(detector.scores_)
    assert detector.threshold_ == ordered[3] == pytest.approx(0.4, abs=1e-6)
    assert detector.threshold(0.3) == ordered[3]  # between the third and the fourth the higher one
    assert detector.threshold(0.45) == ordered[3]
    assert detector.threshold(0.005) == ordered[4]
    assert detector.detect(images).tolist() == [False, False, True, False, False]


@settings(max_examples=50)
@given(
    scores=st.lists(st.integers(-20, 20), min_size=2, max_size=40),
    fpr=st.floats(0.001, 0.499),
)
def test_the_empirical_threshold_keeps_its_rate_on_the_clean_scores(scores: list[int], fpr: float) -> None:
    detector = MMDF(clipped_pixels(HALF), scale=1.0, null="empirical").fit(CLEAN)
    detector.scores_ = np.array(scores, float)
    assert (detector.scores_ > detector.threshold(fpr)).mean() <= fpr + 1e-9
    assert detector.threshold(fpr) in scores
    assert detector.threshold(0.001) >= detector.threshold(fpr)


@pytest.mark.parametrize("null", ["gaussian", "empirical"])
def test_without_bounds_every_score_is_zero_and_nothing_is_detected(null: str) -> None:
    images = torch.rand((9, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    detector = MMDF(ClippedModel(resnet(3, seed=0, width=2, blocks=(1, 1))), null=null)
    detector.fit(labelled(images))
    assert (detector.scale_, detector.threshold_) == (1.0, 0.0)
    assert detector.score(images).tolist() == [0.0] * 9
    assert not detector.detect(images).any()


def test_decisions_by_hand() -> None:
    detector = MMDF(clipped_pixels(HALF), scale=1.0).fit(CLEAN)
    detector.threshold_ = 0.25
    images = pixels((0.9, 0.2, 0.1), (0.9, 0.1, 0.8), (0.6, 0.1, 0.0), (0.6, 0.55, 0.0))
    decisions = detector.decide(images)
    torch.testing.assert_close(decisions.score, torch.tensor([0.4, 0.4, 0.1, 0.1]), atol=1e-6, rtol=0)
    assert decisions.detected.tolist() == [True, True, False, False]
    assert decisions.original.tolist() == [0, 0, 0, 0]
    # the first stays class 0 when clipped, yet is corrected to the best of the others;
    # the last turns when clipped, but is not detected, so the original's decision stands
    assert decisions.clipped.tolist() == [0, 2, 0, 1]
    assert decisions.corrected.tolist() == [1, 2, 0, 0]
    assert decisions.other.tolist() == [1, 2, 1, 1]
    torch.testing.assert_close(decisions.margin, torch.tensor([0.7, 0.1, 0.5, 0.05]), atol=1e-6, rtol=0)
    torch.testing.assert_close(decisions.clipped_margin, torch.tensor([0.3, -0.3, 0.4, -0.05]), atol=1e-6, rtol=0)
    assert torch.equal(detector.detect(images), decisions.detected)
    assert torch.equal(detector.correct(images), decisions.corrected)
    assert torch.equal(detector.score(images), decisions.score)


def test_a_score_at_the_threshold_is_not_detected() -> None:
    detector = MMDF(clipped_pixels(HALF), scale=1.0).fit(CLEAN)
    detector.threshold_ = float(detector.score(CLEAN)[1])
    assert detector.detect(CLEAN).tolist() == [False, False, True]


@settings(max_examples=40)
@given(
    bounds=st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3),
    threshold=st.floats(-0.5, 1),
    seed=st.integers(0, 99),
)
def test_what_is_detected_never_keeps_its_decision(bounds: list[float], threshold: float, seed: int) -> None:
    images = torch.rand((12, 3, 1, 1), generator=torch.Generator().manual_seed(seed))
    detector = MMDF(clipped_pixels(bounds)).fit(CLEAN)
    detector.threshold_ = threshold
    decisions = detector.decide(images)
    assert torch.equal(decisions.original, images.flatten(1).argmax(1))
    assert torch.equal(decisions.detected, decisions.score > threshold)
    kept = decisions.corrected == decisions.original
    assert torch.equal(kept, ~decisions.detected)
    moved = decisions.detected & (decisions.clipped != decisions.original)
    assert torch.equal(decisions.corrected[moved], decisions.clipped[moved])


def test_fit_takes_no_labels_and_gives_the_detector_back() -> None:
    clipped = clipped_pixels(HALF)
    detector = MMDF(clipped)
    assert detector.fit(CLEAN) is detector
    other = LabelledImages(CLEAN.images, torch.tensor([2, 1, 0]), CLASSES)
    assert MMDF(clipped).fit(other).threshold_ == detector.threshold_
    assert clipped.bounds[clipped.sites[0]].tolist() == HALF


def test_before_fit_there_is_no_threshold() -> None:
    detector = MMDF(clipped_pixels(HALF), scale=1.0)
    for call in (detector.score, detector.detect, detector.correct, detector.decide):
        with pytest.raises(ValueError, match="call fit with clean images first"):
            call(CLEAN)
    with pytest.raises(ValueError, match="call fit with clean images first"):
        detector.threshold(0.01)


def test_mmdf_refuses_wrong_arguments() -> None:
    clipped = clipped_pixels(HALF)
    with pytest.raises(ValueError, match="clipped must be a ClippedModel, got Sequential"):
        MMDF(clipped.original)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"null must be one of \('gaussian', 'empirical'\), got 'normal'"):
        MMDF(clipped, null="normal")
    fitted = MMDF(clipped).fit(CLEAN)
    for fpr in (0.0, 0.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"fpr must lie in \(0, 0.5\), got"):
            MMDF(clipped, fpr=fpr)
        with pytest.raises(ValueError, match=r"fpr must lie in \(0, 0.5\), got"):
            fitted.threshold(fpr)
    with pytest.raises(ValueError, match="clean must hold at least two images, got 1"):
        MMDF(clipped).fit(CLEAN[:1])
    with pytest.raises(ValueError, match="clean must hold at least two images, got 0"):
        MMDF(clipped).fit(CLEAN[:0])
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="scale must be positive"):
            MMDF(clipped, scale=scale)
    with pytest.raises(ValueError, match="images must have shape"):
        fitted.detect(CLEAN.images[0])


# --- MM-BD ---

CALM = [11.0, 14.0, 9.0, 12.5, 13.0, 10.0, 12.0, 8.5, 11.5, 10.5]


def judged(margins: list[float]) -> MMBD:
    return MMBD(nn.Flatten()).judge(np.array(margins))


@pytest.mark.parametrize("target", [0, 4, 9])
def test_an_outlying_margin_is_an_attack_on_its_class(target: int) -> None:
    margins = CALM.copy()
    margins[target] = 60.0
    verdict = judged(margins)
    assert verdict.attacked_ is True and verdict.target_ == target and verdict.p_value_ < 1e-6
    assert verdict.margins_.tolist() == margins


def test_margins_without_an_outlier_are_no_attack() -> None:
    verdict = judged(CALM)
    assert verdict.attacked_ is False and verdict.target_ is None and verdict.p_value_ > 0.1


@settings(max_examples=40)
@given(
    margins=st.lists(st.floats(1, 100), min_size=4, max_size=12, unique_by=lambda m: round(m, 1)),
)
def test_the_p_value_is_that_of_the_paper(margins: list[float]) -> None:
    null = sorted(margins)[:-1]
    shape, location, scale = gamma.fit(null, floc=0)
    assert location == 0
    survival = gamma.sf(max(margins), shape, scale=scale)
    verdict = judged(margins)
    assert verdict.p_value_ == pytest.approx(1 - (1 - survival) ** len(margins), abs=1e-9, rel=1e-6)
    assert verdict.attacked_ == (verdict.p_value_ <= 0.05)
    assert verdict.target_ == (margins.index(max(margins)) if verdict.attacked_ else None)


def test_scale_and_order_do_not_matter() -> None:
    margins = [*CALM[:-1], 19.0]
    p_value = judged(margins).p_value_
    assert 1e-5 < p_value < 0.05
    assert judged(margins[::-1]).p_value_ == pytest.approx(p_value)
    assert judged(margins[::-1]).target_ == 0
    assert judged([100 * m for m in margins]).p_value_ == pytest.approx(p_value)


def test_a_tiny_p_value_does_not_round_to_zero() -> None:
    margins = [*CALM[:-1], 40.0]
    shape, _, scale = gamma.fit(CALM[:-1], floc=0)
    survival = gamma.sf(40.0, shape, scale=scale)
    assert 0 < survival < 1e-17 and 1 - (1 - survival) ** 10 == 0
    assert judged(margins).p_value_ == pytest.approx(10 * survival, rel=1e-6, abs=0)


def test_the_significance_decides() -> None:
    margins = np.array([*CALM[:-1], 19.0])
    p_value = MMBD(nn.Flatten()).judge(margins).p_value_
    for significance, attacked in [(p_value * 1.01, True), (p_value * 0.99, False)]:
        verdict = MMBD(nn.Flatten(), significance=significance).judge(margins)
        assert verdict.attacked_ is attacked


@pytest.mark.parametrize(
    ("margins", "attacked"),
    [
        ([5.0] * 10, False),
        ([5.0] * 9 + [5.0000001], False),
        ([5.0] * 9 + [50.0], True),
        ([0.0] * 10, False),  # a model that ignores its input
        ([-3.0] * 9 + [-1.0], False),  # no class is ever decided for by much
        ([-3.0, 4.0, 5.0, 6.0, 5.5, 4.5], False),
    ],
)
def test_margins_that_a_gamma_hardly_fits_get_a_verdict(margins: list[float], attacked: bool) -> None:
    verdict = judged(margins)
    assert verdict.attacked_ is attacked and 0 <= verdict.p_value_ <= 1


@pytest.mark.parametrize(
    "margins",
    [[1.0, 2.0, 3.0], [[1.0, 2.0], [3.0, 4.0]], [1.0, 2.0, 3.0, math.nan], [1.0, 2.0, 3.0, math.inf]],
)
def test_other_than_four_finite_margins_are_refused(margins: list[float]) -> None:
    with pytest.raises(ValueError, match="margins must be at least 4 finite numbers"):
        judged(margins)


def test_margins_may_come_as_a_list_or_a_tensor() -> None:
    expected = judged(CALM).p_value_
    for margins in (CALM, torch.tensor(CALM, dtype=torch.float64)):
        assert MMBD(nn.Flatten()).judge(margins).p_value_ == expected  # type: ignore[arg-type]


def test_fit_judges_the_models_maximum_margins() -> None:
    # Six classes, one pixel each; class 4 answers to its own pixel thirty times as strongly.
    layer = nn.Linear(6, 6)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([1.0, 1.2, 0.9, 1.1, 30.0, 1.05])))
        layer.bias.zero_()
    model = nn.Sequential(nn.Flatten(), layer).train()
    images = LabelledImages(torch.zeros(6, 6, 1, 1), torch.arange(6), tuple("abcdef"))
    config = MaximumMarginConfig(per_class=3, steps=60)
    detector = MMBD(model, config)
    assert detector.fit(images) is detector
    largest = maximum_margin_images(model, (6, 1, 1), 6, config).largest()
    assert detector.margins_.tolist() == largest.tolist()
    assert detector.margins_.tolist() == pytest.approx([1.0, 1.2, 0.9, 1.1, 30.0, 1.05], rel=1e-5)
    assert detector.attacked_ and detector.target_ == 4
    assert model.training and layer.weight.grad is None


def test_mmbd_starts_as_the_paper_does_and_refuses_wrong_arguments() -> None:
    detector = MMBD(nn.Flatten())
    assert detector.config.per_class == 30 and detector.significance == 0.05
    for significance in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"significance must lie in \(0, 1\), got"):
            MMBD(nn.Flatten(), significance=significance)
    with pytest.raises(ValueError, match="needs K >= 4 classes, got 3"):
        detector.fit(CLEAN)
