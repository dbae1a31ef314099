"""`python -m bclip_lab`: build the zoo, measure the field on it or on one's own images, write the tables."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from bclip_lab import benchmark, zoo
from bclip_lab.attacks import MarginLimitedAttack
from bclip_lab.benchmark import Grid, Trained
from bclip_lab.clipping import ClippedModel
from bclip_lab.data.files import data_dir, write_bytes
from bclip_lab.evaluation import Evaluation
from bclip_lab.margins import classification_margins
from bclip_lab.models import logits, resnet10
from bclip_lab.training import run

__all__ = ["main"]

# strength and margin of the attackers of `sweep`
SWEEP = ((0.0, 5.0), (0.1, 5.0), (0.3, 5.0), (1.0, 5.0), (0.1, 2.0), (0.3, 2.0), (1.0, 2.0))


def _show(steps: Iterable[Any], label: str) -> Iterator[Any]:
    """Pass records on, with a progress bar."""
    bar = tqdm(desc=label, unit="epoch")
    for step in steps:
        bar.total = getattr(step, "epochs", bar.total)
        bar.update()
        yield step
    bar.close()


def _build(arguments: argparse.Namespace) -> None:
    for name in arguments.names or zoo.list():
        last = run(_show(zoo.build(name), name))
        print(f"{name}: trained to {last.train_accuracy:.3f}")


def _clip(arguments: argparse.Namespace) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the rows are measured: more threads add in another order
    try:
        for name in arguments.names or zoo.list():
            last = run(_show(zoo.clip(name), name))
            print(f"{name}: bounds that leave {last.accuracy:.3f} of the defender's images as they were decided")
    finally:
        torch.set_num_threads(threads)


def _bench(arguments: argparse.Namespace) -> None:
    _fill(_asked(arguments), arguments)


def _asked(arguments: argparse.Namespace) -> Grid:
    """The grid of the command line, narrowed to the names, methods and seeds that it gives."""
    if arguments.grid == "paper":
        if arguments.images is None:
            raise ValueError("--grid paper needs --images FOLDER: CIFAR-10, one folder a class, in train/ and test/")
        grid = Grid.paper(arguments.images)
    elif arguments.grid in ("small", "training-seeds"):
        grid = Grid.small() if arguments.grid == "small" else Grid.training_seeds()
    else:
        grid = Grid.from_file(Path(arguments.grid))
    if arguments.names:
        kept = tuple(c for c in grid.checkpoints if isinstance(c, benchmark.Shipped) and c.name in arguments.names)
        if unknown := sorted(set(arguments.names) - {c.name for c in kept}):
            raise ValueError(f"the grid {arguments.grid} has no checkpoints {', '.join(unknown)}")
        grid = replace(grid, checkpoints=kept)
    if arguments.methods:
        grid = replace(grid, methods=tuple(arguments.methods))
    if arguments.explained:
        methods = tuple(arguments.methods) if arguments.methods else None
        grid = replace(grid, methods=methods, explained=True)
    return replace(grid, seeds=tuple(arguments.seeds)) if arguments.seeds else grid


def _fill(grid: Grid, arguments: argparse.Namespace) -> None:
    """Measure what is missing of a grid, say what each cell reached, and write what was asked for."""
    waiting = benchmark.missing(grid, arguments.out, retry=arguments.retry)
    for checkpoint in dict.fromkeys(cell.checkpoint for cell in waiting):
        if isinstance(checkpoint, Trained):
            for _ in _show(checkpoint.train(), f"train {checkpoint.images} {checkpoint.attack}"):
                pass
    rows = []
    bar = tqdm(total=len(grid), initial=len(grid) - len(waiting), desc="bench", unit="cell")
    with bar:
        found = benchmark.run(
            grid, arguments.out, jobs=arguments.jobs, address=arguments.address, retry=arguments.retry
        )
        for index, row in enumerate(found):
            rows.append(row)
            if index >= len(grid) - len(waiting):
                bar.update()
                tqdm.write(_line(row), file=sys.stdout)
    cells = benchmark.frame(rows)
    print(f"{len(rows)} cells, {len(waiting)} of them measured now, {cells['error'].notna().sum()} failed")
    for row in rows:
        if "error" in row:
            print("failed:", _line(row))
    if arguments.csv:
        write_bytes(arguments.csv, cells.to_csv(index=False).encode())
    if arguments.latex:
        write_bytes(arguments.latex, benchmark.latex(cells, arguments.measure).encode())


def _line(row: dict[str, Any]) -> str:
    """A row in a line."""
    recipe = row["recipe"]
    checkpoint = recipe["checkpoint"]
    method = row.get("defence", row.get("detector"))
    label = f"{method} {row['seed']} on {recipe['data']} {checkpoint['name']}-{checkpoint['training_seed']}: "
    if "error" in row:
        return f"{label}{row['error']}"
    if "after" not in row:
        told = {k: v for k, v in row.items() if k not in ("key", "recipe", "machine", "detector", "seed")}
        return label + str(told)
    text = " -> ".join(
        " ".join(f"{metric.upper()} {row[when][metric]:.3f}" for metric in ("acc", "asr", "ra") if metric in row[when])
        for when in ("before", "after")
    )
    mmdf = f"; MMDF { {k: round(v, 3) for k, v in row['mmdf'].items()} }" if "mmdf" in row else ""
    return f"{label}{text}{mmdf}; {row['seconds']} s"


def _images(arguments: argparse.Namespace) -> None:
    checkpoint = Trained(
        images=arguments.name,
        path=str(arguments.path),
        attack=arguments.attack,
        poison_rate=arguments.poison_rate,
        per_class=arguments.per_class,
        epochs=arguments.epochs,
        flip=arguments.flip,
        ceiling=arguments.ceiling,
        training_seed=arguments.seed,
    )
    _fill(Grid((checkpoint,), tuple(arguments.methods)), arguments)


def _sweep(arguments: argparse.Namespace) -> None:
    clean = zoo.load("clean-0").model
    recipe = zoo.RECIPES["margin-limited"]
    assert isinstance(recipe.attack, MarginLimitedAttack)
    for strength, margin in SWEEP:
        attack = replace(recipe.attack, strength=strength, margin=margin)
        label = f"strength-{strength:g}-margin-{margin:g}"
        splits = zoo.load("clean-0").splits()
        how = {"name": label, "training_seed": 0, **replace(recipe, attack=attack).describe()}
        on = {"data": "signs", "checkpoint": how, "ceiling": zoo.card("clean-0")["sha256"]}
        told = benchmark.recipe_of(on, "mmac", 0)
        model = resnet10(len(splits.classes), seed=0)
        run(_show(attack.train(model, splits.train, recipe.config), f"train {label}"))
        row = {"key": benchmark.key_of(told), "recipe": told, "defence": "mmac", "seed": 0}
        row |= run(_show(benchmark.measure(model, splits, attack, "mmac", 0, clean), f"mmac {label}"))
        triggered = attack.triggered(splits.test)
        margins = classification_margins(logits(model, triggered.images), triggered.targets.cpu())
        row |= {"strength": strength, "margin": margin, "triggered_margin": float(margins.median())}
        row |= {"mm_bd": benchmark.judge_model(model, splits.defender)}
        benchmark.write(row, "margin-limited", label)
        print(_line(row), "MM-BD", row["mm_bd"], flush=True)


def _tables(arguments: argparse.Namespace) -> None:
    print("\n".join(benchmark.update_readme(arguments.path)))
    _picture(data_dir() / "story.png")


def _picture(path: Path) -> None:
    """The README's picture: trigger, the most abnormal channel, and the recorded numbers before and after."""
    from matplotlib.figure import Figure  # slow to import, and no other command draws

    from bclip_lab import plots

    checkpoint = zoo.load("patch")
    assert checkpoint.attack is not None
    test, attack = checkpoint.splits().test, checkpoint.attack
    clipped = ClippedModel(checkpoint.model)
    triggered = attack.triggered(test)
    found = plots.AbnormalityDisplay.from_model(clipped, test, triggered)
    site, channel, _ = max(found.worst(), key=lambda worst: worst[2])
    row = benchmark.read("mmac", "patch-0-fit-0")
    judged = {name: Evaluation(**row[when]) for name, when in (("attacked", "before"), ("clipped", "after"))}
    figure = Figure(figsize=(18, 5), layout="constrained")
    axes = figure.subplot_mosaic([["clean", "triggered", "activations", "numbers"]], width_ratios=[1, 1, 4, 5.5])
    for name, images in (("clean", test.images[triggered.rows]), ("triggered", triggered.images)):
        axes[name].imshow(images[:9:3].permute(0, 2, 3, 1).flatten(0, 1).numpy())
        axes[name].set(title=name, xticks=[], yticks=[])
    plots.ActivationDisplay.from_model(clipped, test, triggered, site, channel).plot(axes["activations"])
    plots.EvaluationDisplay.from_evaluations(judged, ceiling=row["ra_ceiling"]).plot(axes["numbers"])
    axes["activations"].set_title(f"channel {channel} of {site}")
    axes["numbers"].set_title("before and after its activations are bounded")
    content = io.BytesIO()
    figure.savefig(content, dpi=80)
    write_bytes(path, content.getvalue())


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, metavar="FOLDER", help="of the rows; data/results by default")
    command.add_argument("--jobs", type=int, default=-1, help="processes; -1, the default, is one a core")
    command.add_argument("--address", help="of a Dask scheduler whose workers measure instead, as tcp://host:8786")
    command.add_argument("--retry", action="store_true", help="measure anew what failed")
    command.add_argument("--csv", type=Path, metavar="FILE", help="write one line a cell")
    command.add_argument("--latex", type=Path, metavar="FILE", help="write checkpoints x methods of --measure")
    command.add_argument("--measure", default="asr", help="a column of --csv: asr by default")


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; 0 where it succeeded, 1 after an error, whose message goes to the standard error."""
    methods = [*benchmark.DEFENCES, *benchmark.DETECTORS]
    parser = argparse.ArgumentParser(prog="python -m bclip_lab", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("zoo", help="list, train or clip the checkpoints").add_subparsers(required=True)
    command.add_parser("list").set_defaults(call=lambda _: print("\n".join(zoo.list())))
    build = command.add_parser("build", help="train checkpoints from their fixed seeds")
    build.add_argument("names", nargs="*", metavar="NAME", help="all by default")
    build.set_defaults(call=_build)
    clip = command.add_parser("clip", help="learn the bounds of checkpoints by MMAC")
    clip.add_argument("names", nargs="*", metavar="NAME", help="all by default")
    clip.set_defaults(call=_clip)

    bench = commands.add_parser("bench", help="measure defences and detectors on a grid of checkpoints; resumes")
    bench.add_argument("names", nargs="*", metavar="NAME", help="checkpoints of the zoo; all of the grid by default")
    bench.add_argument("--grid", default="small", help="small (default), paper, training-seeds, or a TOML file")
    bench.add_argument("--images", metavar="FOLDER", help="CIFAR-10 for --grid paper")
    bench.add_argument("--methods", nargs="+", choices=methods, help="all of the grid by default")
    bench.add_argument(
        "--explained", action="store_true", help="of MMAC: measure, too, which sites hold a backdoor back"
    )
    bench.add_argument("--seeds", nargs="+", type=int, help="of the methods; those of the grid by default")
    _add_output(bench)
    bench.set_defaults(call=_bench)

    images = commands.add_parser("images", help="attack, train, clip and detect on a folder of images")
    images.add_argument("path", type=Path, help="class-per-folder, or train/ and test/ of that shape")
    images.add_argument("--name", required=True, help="names the recorded rows, e.g. cifar10")
    images.add_argument("--attack", choices=benchmark.IMAGE_ATTACKS, default="patch")
    images.add_argument("--poison-rate", type=float, default=0.05)
    images.add_argument("--per-class", type=int, default=50, help="images a class for the defender, and to calibrate")
    images.add_argument("--epochs", type=int, default=10)
    images.add_argument("--flip", action="store_true", help="mirror images in training: right for photographs")
    images.add_argument("--ceiling", action="store_true", help="train a clean model too, for the ceiling of RA")
    images.add_argument("--seed", type=int, default=0)
    images.add_argument("--methods", nargs="+", choices=methods, default=["mmac", "mm-bd"])
    _add_output(images)
    images.set_defaults(call=_images)

    sweep = commands.add_parser("sweep", help="train attackers who limit the margin, weakly to strongly, and defend")
    sweep.set_defaults(call=_sweep)

    tables = commands.add_parser("tables", help="write the README's tables and picture from the recorded results")
    tables.add_argument("path", nargs="?", type=Path, default=data_dir().parent / "README.md")
    tables.set_defaults(call=_tables)
    arguments = parser.parse_args(words)
    try:
        arguments.call(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenExecutor as error:
        print(f"error: a process was killed; what was finished is kept. {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        return 130
    return 0
