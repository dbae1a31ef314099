"""`python -m bclip_lab`: build the zoo, evaluate defences on it or on one's own images, write the tables."""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from bclip_lab import benchmark, zoo
from bclip_lab.attacks import MarginLimitedAttack
from bclip_lab.clipping import ClippedModel
from bclip_lab.data import image_folder
from bclip_lab.data.files import data_dir, write_bytes
from bclip_lab.evaluation import Evaluation
from bclip_lab.margins import classification_margins
from bclip_lab.models import logits, resnet10
from bclip_lab.training import TrainConfig, run

__all__ = ["main"]

FIT_SEEDS = (0, 1, 2)
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


def _evaluate(arguments: argparse.Namespace) -> None:
    clean = zoo.load("clean-0").model
    jobs = [(name, seed) for name in arguments.names or zoo.list() for seed in zoo.RECIPES[name].seeds]
    shipped_first = sorted(jobs, key=lambda job: job[1] != zoo.RECIPES[job[0]].seeds[0])
    for name, training_seed in shipped_first:
        checkpoint = zoo.load(name, seed=training_seed)
        splits = checkpoint.splits()
        shipped = training_seed == zoo.RECIPES[name].seeds[0]
        if shipped:
            verdict = benchmark.judge_model(checkpoint.model, splits.defender)
            benchmark.write(verdict, "mm-bd", f"{name}-{training_seed}")
        for defence in arguments.defences:
            # several seeds of the default on a shipped checkpoint, one on each further training seed; of the others one
            several = shipped and defence == "mmac"
            for seed in FIT_SEEDS if several else FIT_SEEDS[:1] if shipped or defence == "mmac" else ():
                label = f"{name}-{training_seed}-fit-{seed}"
                steps = benchmark.measure(checkpoint.model, splits, checkpoint.attack, defence, seed, clean)
                row = run(_show(steps, f"{defence} {label}"))
                benchmark.write(row, defence, label)
                print(defence, label, _line(row), flush=True)


def _line(row: dict[str, Any]) -> str:
    text = " -> ".join(
        " ".join(f"{metric.upper()} {row[when][metric]:.3f}" for metric in ("acc", "asr", "ra") if metric in row[when])
        for when in ("before", "after")
    )
    detection = {k: round(v, 3) for k, v in row["mmdf"].items()}
    return f"{text}; MMDF {detection}; {row['seconds']} s"


def _images(arguments: argparse.Namespace) -> None:
    splits = image_folder(arguments.path, per_class=arguments.per_class)
    attack = benchmark.IMAGE_ATTACKS[arguments.attack](len(splits.classes), arguments.poison_rate)
    config = TrainConfig(epochs=arguments.epochs, flip=arguments.flip)
    models = {}
    seconds = {}
    for name, recipe in (("attacked", zoo.Recipe(attack, config=config)), ("clean", zoo.Recipe(None, config=config))):
        if name == "clean" and not arguments.ceiling:
            continue
        models[name] = resnet10(len(splits.classes), seed=arguments.seed, channels=splits.train.images.shape[1])
        data = recipe.poisoned(splits.train)
        start = time.perf_counter()
        run(_show(recipe.steps(models[name], data, arguments.seed), f"train {name}"))
        seconds[name] = round(time.perf_counter() - start, 1)
    for defence in arguments.defences:
        for seed in FIT_SEEDS if defence == "mmac" else FIT_SEEDS[:1]:
            steps = benchmark.measure(models["attacked"], splits, attack, defence, seed, models.get("clean"))
            row = run(_show(steps, f"{defence} {seed}"))
            row |= {"training_seconds": seconds, "images": arguments.name, "attack": zoo.describe(attack)}
            benchmark.write(row, arguments.name, f"{arguments.attack}-{defence}-fit-{seed}")
            print(defence, seed, _line(row))
    verdict = benchmark.judge_model(models["attacked"], splits.defender)
    benchmark.write(verdict, arguments.name, f"{arguments.attack}-mm-bd")
    print("MM-BD", verdict)


def _sweep(arguments: argparse.Namespace) -> None:
    clean = zoo.load("clean-0").model
    recipe = zoo.RECIPES["margin-limited"]
    assert isinstance(recipe.attack, MarginLimitedAttack)
    for strength, margin in SWEEP:
        attack = replace(recipe.attack, strength=strength, margin=margin)
        label = f"strength-{strength:g}-margin-{margin:g}"
        splits = zoo.load("clean-0").splits()
        model = resnet10(len(splits.classes), seed=0)
        run(_show(attack.train(model, splits.train, recipe.config), f"train {label}"))
        row = run(_show(benchmark.measure(model, splits, attack, "mmac", 0, clean), f"mmac {label}"))
        triggered = attack.triggered(splits.test)
        margins = classification_margins(logits(model, triggered.images), triggered.targets.cpu())
        row |= {"strength": strength, "margin": margin, "triggered_margin": float(margins.median())}
        row |= {"mm_bd": benchmark.judge_model(model, splits.defender)}
        benchmark.write(row, "margin-limited", label)
        print(label, _line(row), "MM-BD", row["mm_bd"], flush=True)


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


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; 0 where it succeeded, 1 after an error, whose message goes to the standard error."""
    parser = argparse.ArgumentParser(prog="python -m bclip_lab", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("zoo", help="list or train the checkpoints").add_subparsers(required=True)
    command.add_parser("list").set_defaults(call=lambda _: print("\n".join(zoo.list())))
    build = command.add_parser("build", help="train checkpoints from their fixed seeds")
    build.add_argument("names", nargs="*", metavar="NAME", help="all by default")
    build.set_defaults(call=_build)

    evaluate = commands.add_parser("evaluate", help="fit defences on the zoo and record what they reach")
    evaluate.add_argument("names", nargs="*", metavar="NAME", help="all checkpoints by default")
    evaluate.add_argument("--defences", nargs="+", choices=benchmark.DEFENCES, default=["mmac", "mm-bm"])
    evaluate.set_defaults(call=_evaluate)

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
    images.add_argument("--defences", nargs="+", choices=benchmark.DEFENCES, default=["mmac"])
    images.set_defaults(call=_images)

    sweep = commands.add_parser("sweep", help="train attackers who limit the margin, weakly to strongly, and defend")
    sweep.set_defaults(call=_sweep)

    tables = commands.add_parser("tables", help="write the README's tables and picture from the recorded results")
    tables.add_argument("path", nargs="?", type=Path, default=data_dir().parent / "README.md")
    tables.set_defaults(call=_tables)
    arguments = parser.parse_args(words)
    try:
        arguments.call(arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        return 130
    return 0
