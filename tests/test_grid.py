"""The grid: whatever breaks it off, nothing is lost, nothing is counted twice, and nothing is left half."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from doubles import Tiny, begun, idling, release

from bclip_lab import benchmark, zoo
from bclip_lab.benchmark import Cell, Grid, Shipped, Trained

ROOT = Path(__file__).parents[1]
SEEDS = tuple(range(6))
SECONDS = 600  # stops what hangs


def tiny(*seeds, **checkpoint):
    return Grid((Tiny(**checkpoint),), ("idle",), seeds or SEEDS)


@pytest.fixture
def idle(tmp_path, monkeypatch):
    """Put `idle` among the defences, and give the file that it notes its seeds in."""

    def put(**settings):
        monkeypatch.setitem(benchmark.DEFENCES, "idle", idling(tmp_path / "log", **settings))
        return tmp_path / "log"

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    return put


def files(folder):
    """The rows that lie in a folder, every one of them whole, and nothing else."""
    names = sorted(path for path in folder.rglob("*") if path.is_file())
    assert all(path.suffix == ".json" for path in names), names
    return {path.stem: json.loads(path.read_text()) for path in names}


def run(grid, folder, **settings):
    return list(benchmark.run(grid, folder, **({"jobs": 1} | settings)))


def test_a_second_run_measures_nothing_and_gives_the_same_rows(tmp_path, idle):
    log = idle()
    first = run(tiny(), tmp_path / "out")
    assert begun(log) == [0, 1, 2, 3, 4, 5] and len(tiny()) == 6
    assert run(tiny(), tmp_path / "out") == first
    assert begun(log) == [0, 1, 2, 3, 4, 5] and benchmark.missing(tiny(), tmp_path / "out") == []
    rows = files(tmp_path / "out")
    assert [rows[f"tiny-fit-{seed}"] for seed in SEEDS] == first
    assert first[0]["before"] == first[0]["after"], "the double leaves the network as it is"
    assert first[0]["key"] == benchmark.key_of(first[0]["recipe"]) and first[0]["seconds"] >= 0


def test_rows_come_one_by_one_and_what_is_broken_off_goes_on(tmp_path, idle):
    log = idle()
    for row in benchmark.run(tiny(), tmp_path / "out", jobs=1):
        if row["seed"] == 2:
            break
    kept = files(tmp_path / "out")
    assert list(kept) == ["tiny-fit-0", "tiny-fit-1", "tiny-fit-2"]
    assert len(run(tiny(), tmp_path / "out")) == 6
    assert all(begun(log).count(seed) == 1 for seed in SEEDS if f"tiny-fit-{seed}" in kept)


def test_an_older_recipe_a_newer_checkpoint_and_a_damaged_file_are_measured_again(tmp_path, idle):
    log = idle()
    run(tiny(0, 1), tmp_path)
    before = files(tmp_path / "idle")["tiny-fit-1"]
    idle(wait=0.001)
    assert not benchmark.current(before)
    assert [cell.seed for cell in benchmark.missing(tiny(0, 1), tmp_path)] == [0, 1]
    after = run(tiny(0, 1), tmp_path)
    assert begun(log) == [0, 1, 0, 1] and len(files(tmp_path / "idle")) == 2
    assert after[1]["key"] != before["key"] and benchmark.current(after[1])
    run(tiny(0, weights="second"), tmp_path)
    assert begun(log)[4:] == [0]
    (tmp_path / "idle" / "tiny-fit-0.json").write_text('{"key": ')
    run(tiny(0, weights="second"), tmp_path)
    assert begun(log)[5:] == [0]


def test_a_failure_is_recorded_stops_no_other_and_is_retried_on_demand(tmp_path, idle):
    log = idle(fails=(1,))
    rows = run(tiny(0, 1, 2), tmp_path / "out")
    assert [row.get("error") for row in rows] == [None, "RuntimeError: seed 1 fails", None]
    assert "doubles.py" in rows[1]["traceback"] and rows[1]["recipe"]["seed"] == 1
    assert files(tmp_path / "out")["tiny-fit-1"] == rows[1]
    run(tiny(0, 1, 2), tmp_path / "out")
    assert begun(log) == [0, 1, 2], "a failure is a result until it is retried"
    run(tiny(0, 1, 2), tmp_path / "out", retry=True)
    assert begun(log) == [0, 1, 2, 1]


def test_processes_share_the_cores_and_record_failures_too(tmp_path, idle):
    log = idle(together=2, fails=(3,))
    rows = run(tiny(), tmp_path / "out", jobs=2)
    done = [row["history"][0] for row in rows if "error" not in row]
    assert len(rows) == 6 and sorted(begun(log)) == list(SEEDS)
    assert len({step["process"] for step in done}) == 2 and os.getpid() not in {step["process"] for step in done}
    assert all(step["threads"] <= max(1, (os.cpu_count() or 1) // 2) for step in done)
    assert [row["seed"] for row in rows if "error" in row] == [3]
    assert len(files(tmp_path / "out")) == 6


def test_a_full_disk_is_said_and_nothing_half_is_left(tmp_path, idle, monkeypatch):
    log = idle()
    write, room = Path.write_bytes, [2]

    def full(path, content):
        if not path.name.startswith(".tiny"):
            return write(path, content)
        if not room[0]:
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        room[0] -= 1
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        run(tiny(), tmp_path / "out")
    assert list(files(tmp_path / "out")) == ["tiny-fit-0", "tiny-fit-1"]
    room[0] = 6
    assert len(run(tiny(), tmp_path / "out")) == 6 and len(files(tmp_path / "out")) == 6
    assert begun(log).count(0) == begun(log).count(1) == 1


# A run of its own, as from the command line.
SCRIPT = """
import sys
from pathlib import Path
from doubles import Tiny, idling
from bclip_lab import benchmark
benchmark.DEFENCES["idle"] = idling(sys.argv[2], **eval(sys.argv[3]))
grid = benchmark.Grid((Tiny(),), ("idle",), tuple(range(6)))
for row in benchmark.run(grid, Path(sys.argv[1]), jobs=int(sys.argv[4])):
    print(row["seed"], flush=True)
"""


def start(folder, log, jobs=1, **settings):
    words = [sys.executable, "-c", SCRIPT, str(folder), str(log), repr(settings), str(jobs)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def until(holds):
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end, "it never came to this"
        time.sleep(0.01)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path, idle, jobs):
    log = idle(held=(2, 3, 4, 5))
    process = start(tmp_path / "out", log, jobs, held=(2, 3, 4, 5))
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.readline()
    until(lambda: len(begun(log)) == 2 + jobs)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    release(log)
    if jobs > 1:  # its workers end what they have begun, and begin nothing more
        until(lambda: len(list((tmp_path / "out" / "idle").glob("tiny*.json"))) == 4)
        time.sleep(0.5)
    kept = {row["seed"] for row in files(tmp_path / "out").values()}
    assert kept == ({0, 1} if jobs == 1 else {0, 1, 2, 3})
    assert len(begun(log)) == len(kept) + (jobs == 1)
    assert sorted(row["seed"] for row in run(tiny(), tmp_path / "out")) == list(SEEDS)
    assert all(begun(log).count(seed) == 1 for seed in kept)
    assert len(files(tmp_path / "out")) == 6


def test_two_runs_at_once_lose_nothing_and_count_nothing_twice(tmp_path, idle):
    log = idle(wait=0.1, together=2)
    both = [start(tmp_path / "out", log, wait=0.1, together=2) for _ in range(2)]
    said = [process.communicate(timeout=SECONDS)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert [sorted(words) for words in said] == [[str(seed) for seed in SEEDS]] * 2
    rows = files(tmp_path / "out")
    assert sorted(row["seed"] for row in rows.values()) == list(SEEDS)
    before = begun(log)
    assert len(run(tiny(), tmp_path / "out")) == 6 and begun(log) == before


def test_a_worker_of_a_cluster_may_die(tmp_path, idle):
    distributed = pytest.importorskip("distributed")
    log = idle(wait=0.3, kills=(4,))
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=str(tmp_path / "dask")
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        workers = list(client.run(os.getpid).values())
        rows = []
        for row in benchmark.run(tiny(), tmp_path / "out", address=cluster.scheduler_address):
            rows.append(row)
            if len(rows) == 1:
                os.kill(workers[0], signal.SIGKILL)
    assert sorted(row["seed"] for row in rows) == list(SEEDS) and len(files(tmp_path / "out")) == 6
    errors = {row["seed"]: row["error"] for row in rows if "error" in row}
    assert list(errors) == [4] and errors[4].startswith("KilledWorker"), "it kills every worker that takes it"
    assert set(begun(log)) == set(SEEDS)
    assert {row["history"][0]["process"] for row in rows if "error" not in row}.isdisjoint({os.getpid()})


def test_a_machine_with_another_checkpoint_says_so(tmp_path, idle):
    idle()
    cell = Cell(Tiny(), "idle", 0)
    object.__setattr__(cell, "checkpoint", Tiny(weights="second"))
    row = benchmark.cells.fill(cell, benchmark.DEFENCES["idle"])
    assert "another checkpoint" in row["error"]


def test_a_grid_has_every_method_and_once_is_once():
    grid = Grid((Shipped("patch", 0), Shipped("face", 0)), ("mmac", "mmac-published"), (3, 4))
    assert [cell.file for cell in grid.cells()] == [
        ("mmac", "patch-0-fit-3"), ("mmac", "patch-0-fit-4"), ("mmac-published", "patch-0-fit-3"),
        ("mmac", "face-0-fit-3"), ("mmac", "face-0-fit-4"), ("mmac-published", "face-0-fit-3"),
    ]  # fmt: skip
    assert len(grid) == 6
    small = Grid.small()
    assert len(small.checkpoints) == len(zoo.list()) and set(small.methods or ()) == {
        *benchmark.DEFENCES,
        *benchmark.DETECTORS,
    }
    assert {(cell.name, cell.training_seed) for cell in Grid.training_seeds().checkpoints} == {
        (name, seed) for name, recipe in zoo.RECIPES.items() for seed in recipe.seeds[1:]
    }
    assert [checkpoint.attack for checkpoint in Grid.paper("cifar10").checkpoints] == ["patch", "blended"]


def test_a_grid_from_a_file(tmp_path):
    file = tmp_path / "grid.toml"
    file.write_text(
        'checkpoints = ["patch", "clean-1"]\nmethods = ["mmac"]\nseeds = [5]\n'
        '[[images]]\nimages = "mine"\npath = "my/images"\nattack = "warp"\nepochs = 3\n'
    )
    mine = Trained(images="mine", path="my/images", attack="warp", epochs=3)
    assert Grid.from_file(file) == Grid((Shipped("patch", 0), Shipped("clean-1", 1), mine), ("mmac",), (5,))
    file.write_text('checkpoints = ["patch"]\n')
    assert Grid.from_file(file) == Grid((Shipped("patch", 0),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("checkpoints = [", "not TOML"),
        ('checkpoint = ["patch"]', r"keys \['checkpoint'\]"),
        ('checkpoints = ["magic"]', "'magic'"),
        ('checkpoints = ["patch"]\nmethods = ["magic"]', "method must be one of"),
        ('checkpoints = ["patch"]\nseeds = []', "seeds must not be empty"),
        ("seeds = [1]", "checkpoints must not be empty"),
        ('[[images]]\nimages = "mine"', "no path"),
        ('[[images]]\nimages = "mine"\npath = "."\nattack = "magic"', "attack must be one of"),
        ('[[images]]\nimages = "mine"\npath = "."\nwidth = 3', r"\['width'\]"),
    ],
)
def test_a_grid_file_that_is_wrong_is_refused(tmp_path, text, message):
    file = tmp_path / "grid.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        Grid.from_file(file)
    with pytest.raises(FileNotFoundError, match=r"none\.toml"):
        Grid.from_file(tmp_path / "none.toml")


def test_peak_memory_is_of_this_piece_of_work_and_not_of_one_before():
    memory = benchmark.memory

    def peak(megabytes):
        watch = memory.Peak()
        content = bytearray(megabytes * 2**20)
        content[::4096] = b"x" * len(content[::4096])
        del content
        return watch.megabytes()

    if memory.Peak().megabytes() is None:
        pytest.skip("the system does not tell")
    small, large, again = peak(40), peak(300), peak(40)
    assert 38 <= small <= 60 and 295 <= large <= 330 and abs(again - small) <= 15
