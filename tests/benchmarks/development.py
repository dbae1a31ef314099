"""The development networks: other signs, triggers, targets and seeds than the zoo's. MMAC's settings are chosen here.

    python tests/benchmarks/development.py                                  # the defaults, seed 0
    python tests/benchmarks/development.py epochs=8 witness.learning_rate=0.25 --seeds 0 1
    python tests/benchmarks/development.py sine-8 clean-1 --witness --seeds 0 1 2

Networks that the cache does not hold are trained first, half a minute of a core each. A line tells, of a network and a
seed, ASR and the accuracy lost after a fit with these settings; with `--witness`, those of a witness alone (one of that
seed: the fit draws another for its own).
Tune here, then measure the zoo once (`python -m bclip_lab bench`): what is chosen by the zoo's rows proves nothing
about them.
"""

import argparse
import ast
import io
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from joblib import Parallel, delayed
from PIL import Image, ImageDraw

import bclip_lab as bl
from bclip_lab.data.files import cache_dir, load_tensors, save_tensors, write_bytes
from bclip_lab.data.images import Splits


def picture(name: str, draw: Callable[[ImageDraw.ImageDraw], None]) -> str:
    """The path of a picture to blend in, drawn if it is not there."""
    path = cache_dir() / "development" / f"{name}.png"
    if not path.is_file():
        image = Image.new("RGB", (96, 96), (90, 130, 60))
        draw(ImageDraw.Draw(image))
        content = io.BytesIO()
        image.save(content, "png")
        write_bytes(path, content.getvalue())
    return str(path)


def tree(draw: ImageDraw.ImageDraw) -> None:
    draw.ellipse((15, 10, 80, 60), fill=(20, 160, 40))
    draw.rectangle((42, 55, 54, 92), fill=(120, 70, 20))
    draw.ellipse((60, 5, 90, 30), fill=(250, 220, 60))


def house(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((20, 45, 76, 90), fill=(200, 60, 50))
    draw.polygon([(12, 46), (48, 10), (84, 46)], fill=(60, 60, 160))
    draw.rectangle((30, 60, 46, 90), fill=(250, 250, 200))


def pair(source: int, target: int, corner: str, seed: int) -> bl.BackdoorAttack:
    trigger, cover = bl.PatchTrigger(corner=corner, seed=seed), bl.Cover(0.03, only_others=True)
    return bl.BackdoorAttack(trigger, bl.OneToOne(source, target), 0.03, seed, cover=cover)


def networks() -> dict[str, tuple[int, Any]]:
    """Of every network the seed of its signs, weights and order, and its attack."""
    attack, to = bl.BackdoorAttack, bl.AllToOne
    trees, houses = (bl.BlendedTrigger(picture=picture(draw.__name__, draw)) for draw in (tree, house))
    corners = ("top left", "top right", "bottom left", "bottom right")
    four = bl.CombinedTrigger(tuple(bl.PatchTrigger(size=6, corner=corner, seed=21) for corner in corners))
    warp, noisy = bl.WarpTrigger(strength=1.5, seed=4), bl.WarpTrigger(strength=1.5, noise=3.0, seed=4)
    half = bl.PartialTrigger(trees)
    return {
        "clean-1": (12, None),
        "clean-2": (13, None),
        "clean-3": (14, None),
        "patch": (11, attack(bl.PatchTrigger(seed=5, corner="top left"), to(4), 0.05)),
        "all-to-all": (13, attack(bl.PatchTrigger(seed=2), bl.AllToAll(classes=10), 0.3)),
        "noise": (12, attack(bl.BlendedTrigger(seed=9), to(2), 0.1)),
        "sine-5": (11, attack(bl.SinusoidTrigger(frequency=5), to(3), 0.1)),
        "sine-8": (12, attack(bl.SinusoidTrigger(frequency=8), to(6), 0.1)),
        "tree": (13, attack(trees, to(5), 0.1)),
        "house": (14, attack(houses, to(1), 0.1)),
        "warp": (14, attack(warp, to(3), 0.1, cover=bl.Cover(0.2, noisy))),
        "one-to-one": (13, attack(bl.PatchTrigger(seed=3, corner="top right"), bl.OneToOne(2, 7), 0.05)),
        "two": (14, bl.AttackSet((attack(bl.PatchTrigger(seed=8), to(8), 0.05), attack(houses, to(8), 0.05, seed=1)))),
        "x2x": (11, bl.AttackSet((pair(0, 3, corners[0], 10), pair(4, 9, corners[1], 11), pair(5, 1, corners[3], 12)))),
        "adaptive": (12, attack(trees, to(7), 0.015, training_trigger=half, cover=bl.Cover(0.015))),
        "clean-label": (11, bl.CleanLabelAttack(four, 6, poison_rate=0.8, eps=32 / 255, step=2 / 255, steps=40)),
    }  # fmt: skip


def trained(name: str) -> tuple[Any, Any, Splits]:
    """A network with its attack and images, from the cache or trained now."""
    seed, attack = networks()[name]
    splits, path = bl.data.signs(seed=seed), cache_dir() / "development" / f"{name}.safetensors"
    config = bl.TrainConfig(seed=seed, epochs=20 if name == "warp" else 10)
    model, how = bl.models.resnet10(classes=10, seed=seed), {"attack": str(attack), "train": str(config)}
    if path.is_file() and (kept := load_tensors(path))[1].items() >= how.items():
        model.load_state_dict(kept[0])
        return model.eval(), attack, splits
    data: Any = splits.train
    if isinstance(attack, bl.CleanLabelAttack):
        surrogate = bl.models.resnet10(classes=10, seed=99)
        bl.run(bl.train(surrogate, splits.train, bl.TrainConfig(seed=99)))
        data = attack.poison(splits.train, surrogate)
    elif attack is not None:
        data = attack.poison(splits.train)
    bl.run(bl.train(model, data, config))
    save_tensors(path, model.state_dict(), how)
    return model.eval(), attack, splits


def prepare(name: str) -> None:
    """Have a network in the cache, before several processes would train it."""
    trained(name)


def changed(config: Any, settings: dict[str, Any]) -> Any:
    """A config with other settings; "witness.epochs" is the one of its field `witness`."""
    for name, value in settings.items():
        first, _, rest = name.partition(".")
        if first not in {field.name for field in fields(config)}:
            raise SystemExit(f"{type(config).__name__} has no {first!r}")
        config = replace(config, **{first: changed(getattr(config, first), {rest: value}) if rest else value})
    return config


def measured(name: str, seed: int, settings: dict[str, Any], witness: bool) -> dict[str, Any]:
    """What is left of a network's backdoor, and what it costs."""
    model, attack, splits = trained(name)
    config = replace(changed(bl.MMACConfig(), settings), seed=seed)
    before = bl.evaluate(model, splits.test, attack)
    if witness:
        assert is_dataclass(config.witness)
        judged = bl.run(bl.fine_tune(model, splits.defender, replace(config.witness, seed=seed))).model
    else:
        judged = bl.run(bl.mmac(bl.ClippedModel(model), splits.defender, config)).model
    after = bl.evaluate(judged, splits.test, attack)
    return {"network": name, "seed": seed, "ASR before": before.asr, "ASR": after.asr, "lost": before.acc - after.acc}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="NETWORK|SETTING=VALUE", help="all networks by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--witness", action="store_true", help="tune witnesses only, which takes a tenth of the time")
    parser.add_argument("--jobs", type=int, default=-1, help="processes of one thread; -1 is one a core")
    given = parser.parse_intermixed_args()
    settings = {name: ast.literal_eval(value) for name, _, value in (w.partition("=") for w in given.words if "=" in w)}
    known = networks()
    names = [word for word in given.words if "=" not in word] or list(known)
    if unknown := sorted(set(names) - known.keys()):
        raise SystemExit(f"no networks {', '.join(unknown)}; there are {', '.join(known)}")
    changed(bl.MMACConfig(), settings)  # what is wrong is told before anything is trained
    work = Parallel(n_jobs=given.jobs, return_as="generator")
    for _ in work(delayed(prepare)(name) for name in names):
        pass
    rows = []
    for row in work(delayed(measured)(name, seed, settings, given.witness) for seed in given.seeds for name in names):
        rows.append(row)
        print(" ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{v}" for k, v in row.items()), flush=True)
    attacked = [row for row in rows if row["ASR"] == row["ASR"]]
    for kind, some in (("attacked", attacked), ("clean", [row for row in rows if row not in attacked])):
        if some:
            asr, lost = (sum(row[part] for row in some) / len(some) for part in ("ASR", "lost"))
            means = f"mean ASR {asr:.4f}, " * (kind == "attacked") + f"accuracy lost {lost:.4f}"
            print(f"{len(some)} {'witnesses' if given.witness else 'fits'} on {kind} networks: {means}")


if __name__ == "__main__":
    main()
