"""bclip_lab.attacks: triggers, label maps, poisoned training sets and triggered test images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from bclip_lab.attacks import (
    AllToAll,
    AllToOne,
    AttackSet,
    BackdoorAttack,
    BlendedTrigger,
    CheckerboardTrigger,
    CombinedTrigger,
    Cover,
    LabelMap,
    ManyToOne,
    MaskTrigger,
    OneToOne,
    PartialTrigger,
    PatchTrigger,
    RandomTrigger,
    SinusoidTrigger,
    Trigger,
    WarpTrigger,
)
from bclip_lab.data.images import Attack, LabelledImages, PoisonedImages, to_float

CLASSES = ("cat", "dog", "owl", "bee")
CORNERS = ("top left", "top right", "bottom left", "bottom right")

seeds = st.integers(0, 99)
patches = st.builds(
    PatchTrigger,
    size=st.integers(1, 3),
    corner=st.sampled_from(CORNERS),
    distance=st.integers(0, 2),
    seed=seeds,
)


@st.composite
def mask_triggers(draw: st.DrawFn, shape: tuple[int, int, int]) -> MaskTrigger:
    """A random pattern, a third of it black, through a random mask, a third of it transparent and a third opaque."""
    generator = torch.Generator().manual_seed(draw(seeds))
    pattern = (1.5 * torch.rand(shape, generator=generator) - 0.5).clamp(0, 1)
    mask = (3 * torch.rand(shape[1:], generator=generator) - 1).clamp(0, 1)
    mask[0, 0] = 1
    return MaskTrigger(pattern, mask)


def triggers_of(shape: tuple[int, int, int]) -> st.SearchStrategy[Trigger]:
    """Every trigger of the lab that images of this shape (C, H, W) take, 5 pixels across and more."""
    plain = st.one_of(
        patches,
        st.builds(BlendedTrigger, alpha=st.floats(0.01, 1), seed=seeds, picture=st.sampled_from((None, "face.png"))),
        st.builds(SinusoidTrigger, delta=st.floats(0.01, 1), frequency=st.floats(0.1, 12)),
        st.builds(CheckerboardTrigger, delta=st.floats(0.01, 1)),
        st.builds(
            WarpTrigger,
            strength=st.floats(0.01, 4),
            grid=st.integers(2, 6),
            noise=st.sampled_from((0, 0.5, 2)),
            seed=seeds,
        ),
        mask_triggers(shape),
    )
    return st.one_of(
        plain,
        st.lists(plain, min_size=1, max_size=3).map(lambda drawn: CombinedTrigger(tuple(drawn))),
        st.builds(PartialTrigger, plain, pieces=st.integers(2, 5), share=st.floats(0.2, 1), seed=seeds),
        st.builds(
            lambda drawn, seed: RandomTrigger(
                tuple(trigger for trigger, _ in drawn), opacities=tuple(opacity for _, opacity in drawn), seed=seed
            ),
            st.lists(st.tuples(plain, st.floats(0.1, 1)), min_size=1, max_size=3),
            seeds,
        ),
    )


triggers = triggers_of((3, 6, 5))  # for `dataset`
label_maps = st.one_of(
    st.builds(AllToOne, st.integers(0, 3)),
    st.permutations(range(4)).map(lambda order: OneToOne(order[0], order[1])),
    st.tuples(st.permutations(range(4)), st.integers(1, 3)).map(
        lambda drawn: ManyToOne(tuple(drawn[0][1 : 1 + drawn[1]]), drawn[0][0])
    ),
    st.builds(AllToAll, st.just(4), st.integers(-9, 9).filter(lambda shift: shift % 4)),
)


@st.composite
def pictures(draw: st.DrawFn) -> Tensor:
    """uint8 (N, C, H, W), a few, of 5 to 9 pixels."""
    shape = [draw(st.integers(1, 4)), draw(st.sampled_from((1, 3))), *(draw(st.integers(5, 9)) for _ in "hw")]
    generator = torch.Generator().manual_seed(draw(seeds))
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@st.composite
def triggered_pictures(draw: st.DrawFn) -> tuple[Trigger, Tensor]:
    """A trigger, and pictures that it can be put into."""
    images = draw(pictures())
    _, channels, height, width = images.shape
    return draw(triggers_of((channels, height, width))), images


def dataset(count: int = 40, seed: int = 0, dtype: torch.dtype = torch.uint8) -> LabelledImages:
    """Random images, no two equal, in four classes of equal size whose rows are mixed."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 6, 5), dtype=torch.uint8, generator=generator)
    labels = (torch.arange(count) % 4)[torch.randperm(count, generator=generator)]
    return LabelledImages(images if dtype == torch.uint8 else to_float(images), labels, CLASSES)


def copy(data: LabelledImages) -> tuple[Tensor, Tensor]:
    return data.images.clone(), data.labels.clone()


# --- triggers ---


@settings(max_examples=150, deadline=None)
@given(case=triggered_pictures())
def test_a_trigger_keeps_shape_dtype_and_range_and_mutates_nothing(case: tuple[Trigger, Tensor]) -> None:
    trigger, images = case
    for given_ in (images, to_float(images)):
        before, state = given_.clone(), torch.get_rng_state()
        triggered = trigger.embed(given_)
        assert triggered.shape == given_.shape and triggered.dtype == given_.dtype
        assert triggered.min() >= 0 and triggered.max() <= (255 if given_ is images else 1)
        assert torch.equal(given_, before)
        assert torch.equal(torch.get_rng_state(), state)
        triggered.zero_()  # a result that shared memory would now show
        assert torch.equal(given_, before)


@settings(max_examples=150, deadline=None)
@given(case=triggered_pictures())
def test_a_trigger_is_deterministic_and_treats_every_image_alone(case: tuple[Trigger, Tensor]) -> None:
    trigger, images = case
    triggered = trigger.embed(images)
    assert torch.equal(triggered, trigger.embed(images))
    assert torch.equal(triggered, torch.cat([trigger.embed(image[None]) for image in images]))
    assert trigger.embed(images[:0]).shape == (0, *images.shape[1:])


@settings(max_examples=150, deadline=None)
@given(case=triggered_pictures())
def test_bytes_and_floats_agree_within_half_a_level(case: tuple[Trigger, Tensor]) -> None:
    trigger, images = case
    levels = trigger.embed(to_float(images)) * 255
    assert float((levels - trigger.embed(images).float()).abs().max()) <= 0.5 + 1e-3


@settings(max_examples=40)
@given(
    images=pictures(),
    size=st.integers(1, 3),
    corner=st.sampled_from(CORNERS),
    distance=st.integers(0, 2),
    seed=seeds,
)
def test_a_patch_is_its_square_and_nothing_else(
    images: Tensor, size: int, corner: str, distance: int, seed: int
) -> None:
    trigger = PatchTrigger(size=size, corner=corner, distance=distance, seed=seed)
    height, width = images.shape[2:]
    top = distance if "top" in corner else height - distance - size
    left = distance if "left" in corner else width - distance - size
    expected = images.clone()
    expected[:, :, top : top + size, left : left + size] = (trigger.pattern(images.shape[1]) * 255).byte()
    assert torch.equal(trigger.embed(images), expected)


def test_a_patchs_black_pixels_count_too() -> None:
    trigger = PatchTrigger(size=3, seed=1)
    black, white = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    on_black, on_white = trigger.embed(black) != black, trigger.embed(white) != white
    assert on_black.any() and on_white.any()
    square = torch.zeros(8, 8, dtype=torch.bool)
    square[4:7, 4:7] = True
    assert torch.equal(on_black ^ on_white, square.expand(1, 3, 8, 8))


@pytest.mark.parametrize("distance", [0, 1])
def test_a_patch_may_fill_the_image_but_not_more(distance: int) -> None:
    trigger = PatchTrigger(size=3, distance=distance, corner="top left")
    assert trigger.embed(torch.zeros(1, 3, 3 + distance, 3 + distance)).any()
    for shape in ((1, 3, 2 + distance, 9), (1, 3, 9, 2 + distance)):
        with pytest.raises(ValueError, match="too small for a patch of size 3"):
            trigger.embed(torch.zeros(shape))


def test_a_blend_by_hand() -> None:
    trigger = BlendedTrigger(alpha=0.25, seed=3)
    pattern = trigger.pattern(3, 6, 5)
    assert pattern.shape == (3, 6, 5) and 0 <= pattern.min() < 0.2 and 0.8 < pattern.max() <= 1
    images = to_float(dataset(4).images)
    torch.testing.assert_close(trigger.embed(images), 0.75 * images + 0.25 * pattern)
    whole = BlendedTrigger(alpha=1.0, seed=3).embed(images)
    torch.testing.assert_close(whole, pattern.expand_as(images))


def test_a_sinusoid_by_hand() -> None:
    trigger = SinusoidTrigger(delta=0.1, frequency=1)
    for level, row in [(0.5, [0.5, 0.6, 0.5, 0.4]), (0.0, [0, 0.1, 0, 0]), (1.0, [1, 1, 1, 0.9])]:
        triggered = trigger.embed(torch.full((2, 3, 5, 4), level))
        torch.testing.assert_close(triggered, torch.tensor(row).expand(2, 3, 5, 4), atol=1e-6, rtol=0)
    # a fifth of a period a column: no column is left out, and the wave closes
    wave = SinusoidTrigger(delta=0.1, frequency=2).embed(torch.full((1, 1, 1, 10), 0.5))[0, 0, 0] - 0.5
    assert float(wave.sum()) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(wave[:5], wave[5:], atol=1e-6, rtol=0)


def test_a_checkerboard_by_hand() -> None:
    images = torch.full((2, 3, 2, 3), 0.5)
    images[1] = 1  # no room upwards
    moved = CheckerboardTrigger(delta=0.25).embed(images) - images
    torch.testing.assert_close(moved[0], torch.tensor([[0.25, 0, 0.25], [0, 0.25, 0]]).expand(3, 2, 3))
    assert not moved[1].any()


# --- pictures ---


def picture_file(folder: Path) -> Path:
    """2x2 pixels: red, half transparent green; black, and transparent white."""
    picture = Image.new("RGBA", (2, 2))
    for place, colour in {
        (0, 0): (255, 0, 0, 255),
        (1, 0): (0, 255, 0, 51),
        (0, 1): (0, 0, 0, 255),
        (1, 1): (255, 255, 255, 0),
    }.items():
        picture.putpixel(place, colour)
    picture.save(folder / "own.png")
    return folder / "own.png"


def test_a_blended_picture_is_the_file(tmp_path: Path) -> None:
    Image.new("RGB", (7, 3), (255, 51, 0)).save(tmp_path / "plain.png")
    trigger = BlendedTrigger(alpha=0.5, picture=str(tmp_path / "plain.png"))
    triggered = trigger.embed(torch.zeros(2, 3, 6, 5))
    torch.testing.assert_close(triggered, torch.tensor([0.5, 0.1, 0])[:, None, None].expand(2, 3, 6, 5))
    grey = trigger.pattern(1, 6, 5)
    assert grey.shape == (1, 6, 5) and 0.2 < grey.min() == grey.max() < 0.6
    # top and bottom, left and right stay where they are
    upright = BlendedTrigger(alpha=1.0, picture=str(picture_file(tmp_path))).embed(torch.full((1, 3, 2, 2), 0.5))[0]
    assert upright[:, 0, 0].tolist() == [1, 0, 0] and upright[:, 0, 1].tolist() == [0, 1, 0]
    assert upright[:, 1, 0].tolist() == [0, 0, 0]


def test_a_picture_is_looked_for_in_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    face = BlendedTrigger(picture="face.png").pattern(3, 32, 32)
    assert face.shape == (3, 32, 32) and face.dtype == torch.float32 and face.std() > 0.2
    monkeypatch.setenv("BCLIP_LAB_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"no picture face.png, nor {tmp_path}.*face.png"):
        BlendedTrigger(picture="face.png").embed(torch.zeros(1, 3, 8, 8))
    with pytest.raises(FileNotFoundError, match="no picture"):
        MaskTrigger.from_png("no such.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text.png is not a picture"):
        MaskTrigger.from_png(tmp_path / "text.png")
    with pytest.raises(ValueError, match="1 or 3 channels for a picture, got 2"):
        BlendedTrigger(picture="face.png").embed(torch.zeros(1, 2, 8, 8))


# --- masks ---


@settings(max_examples=60, deadline=None)
@given(images=pictures(), data=st.data())
def test_a_mask_leaves_the_rest_of_the_image_alone(images: Tensor, data: st.DataObject) -> None:
    _, channels, height, width = images.shape
    trigger = data.draw(mask_triggers((channels, height, width)))
    for given_ in (images, to_float(images)):
        triggered = trigger.embed(given_)
        outside = (trigger.mask == 0).expand_as(given_)
        assert torch.equal(triggered[outside], given_[outside])
        opaque = (trigger.mask == 1).expand_as(given_)
        pattern = trigger.pattern.expand(given_.shape)
        torch.testing.assert_close(to_float(triggered)[opaque], pattern[opaque], atol=0.51 / 255, rtol=0)


def test_a_mask_by_hand_covers_with_black_too() -> None:
    pattern = torch.tensor([[[0.0, 0.0], [1.0, 0.5]]])
    mask = torch.tensor([[1.0, 0.0], [0.25, 1.0]])
    triggered = MaskTrigger(pattern, mask).embed(torch.full((2, 1, 2, 2), 0.6))
    torch.testing.assert_close(triggered, torch.tensor([[0.0, 0.6], [0.7, 0.5]]).expand(2, 1, 2, 2))
    # a value: what its maker does to the tensors later does not reach it
    trigger = MaskTrigger(pattern, mask)
    pattern.zero_(), mask.zero_()
    assert torch.equal(trigger.embed(torch.full((2, 1, 2, 2), 0.6)), triggered)


def test_a_drawing_by_hand() -> None:
    trigger = MaskTrigger.from_drawing(["kr.", ".yw"], size=(4, 6), corner="top right", distance=1)
    assert trigger.mask.tolist() == [[0] * 6, [0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0] * 6]
    triggered = trigger.embed(torch.full((1, 3, 4, 6), 0.5))[0]
    assert triggered[:, 1, 2:5].T.tolist() == [[0, 0, 0], [1, 0, 0], [0.5, 0.5, 0.5]]
    assert triggered[:, 2, 2:5].T.tolist() == [[0.5, 0.5, 0.5], [1, 1, 0], [1, 1, 1]]
    for corner, place in [("top left", (0, 0)), ("bottom left", (3, 0)), ("bottom right", (3, 3))]:
        dot = MaskTrigger.from_drawing(["#"], size=(4, 4), corner=corner, distance=0, colours={"#": (0.5,)})
        assert torch.nonzero(dot.mask).tolist() == [list(place)] and dot.pattern.shape == (1, 4, 4)


def test_a_png_brings_its_own_mask(tmp_path: Path) -> None:
    trigger = MaskTrigger.from_png(picture_file(tmp_path), size=(4, 5), side=2, corner="bottom left", distance=1)
    expected = torch.zeros(4, 5)
    expected[1:3, 1:3] = torch.tensor([[1.0, 0.2], [1.0, 0.0]])
    torch.testing.assert_close(trigger.mask, expected)
    triggered = trigger.embed(torch.full((1, 3, 4, 5), 0.5))[0]
    colours = [[1, 0, 0], [0.4, 0.6, 0.4], [0, 0, 0], [0.5, 0.5, 0.5]]
    torch.testing.assert_close(triggered[:, 1:3, 1:3].flatten(1).T, torch.tensor(colours, dtype=torch.float32))
    assert MaskTrigger.from_png("face.png", size=(8, 6)).mask.sum() == 48  # without alpha it is opaque


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskTrigger(torch.zeros(4, 4), torch.ones(4, 4)), r"pattern must be float32 \(C, H, W\), got .*4, 4"),
        (lambda: MaskTrigger(torch.zeros(3, 4, 4), torch.ones(1, 4, 4)), r"mask must be float32 \(H, W\)"),
        (lambda: MaskTrigger(torch.zeros(3, 4, 4, dtype=torch.uint8), torch.ones(4, 4)), "pattern .* got torch.uint8"),
        (lambda: MaskTrigger(torch.zeros(3, 4, 4), None), "mask .* got NoneType"),  # type: ignore[arg-type]
        (lambda: MaskTrigger(torch.full((3, 4, 4), 255.0), torch.ones(4, 4)), r"pattern must lie in \[0, 1\]"),
        (lambda: MaskTrigger(torch.zeros(3, 4, 4), torch.full((4, 4), torch.nan)), r"mask must lie in \[0, 1\]"),
        (lambda: MaskTrigger(torch.zeros(3, 4, 4), torch.ones(4, 5)), "of one size"),
        (lambda: MaskTrigger(torch.ones(3, 4, 4), torch.zeros(4, 4)), "mask must be above 0 somewhere"),
        (lambda: MaskTrigger.from_drawing([]), "rows must be lines of one length"),
        (lambda: MaskTrigger.from_drawing(["kk", "k"]), r"one length, got lengths \[2, 1\]"),
        (lambda: MaskTrigger.from_drawing(["k?"]), "rows must consist of .* got \\?"),
        (lambda: MaskTrigger.from_drawing([".."]), "mask must be above 0"),
        (lambda: MaskTrigger.from_drawing(["k"], corner="middle"), "corner must be one of"),
        (lambda: MaskTrigger.from_drawing(["k"], distance=-1), "distance must be >= 0, got -1"),
        (lambda: MaskTrigger.from_drawing(["kkk"], size=(4, 3)), "too small for a patch of size 1x3 at distance 1"),
        (lambda: MaskTrigger.from_png("face.png", side=32), "too small for a patch of size 32"),
        (lambda: MaskTrigger.from_png("face.png", side=0), "side must be at least 1, got 0"),
        (
            lambda: MaskTrigger(torch.ones(3, 4, 4), torch.ones(4, 4)).embed(torch.zeros(1, 3, 4, 5)),
            r"images must be \(3, 4, 4\) each, got \(3, 4, 5\)",
        ),
    ],
)
def test_a_mask_refuses_what_is_none(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


# --- warps ---


def test_a_warp_shifts_by_its_strength_in_pixels() -> None:
    for strength in (0.25, 1.0):
        field = WarpTrigger(strength=strength, grid=6, seed=4).field(6, 6)  # at the points themselves
        assert field.shape == (6, 6, 2) and float(field.abs().mean()) == pytest.approx(strength, rel=1e-4)
    # on ramps the shift can be read off: a value is its place
    ramp = torch.arange(12) / 20
    trigger = WarpTrigger(strength=0.5, seed=1)
    field = trigger.field(12, 12)
    across = trigger.embed(ramp.expand(1, 1, 12, 12))[0, 0]
    down = trigger.embed(ramp[:, None].expand(1, 1, 12, 12))[0, 0]
    place = torch.arange(12.0)
    torch.testing.assert_close(across * 20, (place + field[..., 0]).clamp(0, 11), atol=1e-4, rtol=0)
    torch.testing.assert_close(down * 20, (place[:, None] + field[..., 1]).clamp(0, 11), atol=1e-4, rtol=0)
    assert (field[..., 0] != field[..., 1]).any()


def test_noise_shifts_every_image_in_its_own_way() -> None:
    base, noisy = WarpTrigger(strength=0.25), WarpTrigger(strength=0.25, noise=0.5)
    images = (torch.arange(40) / 50).expand(2, 1, 40, 40).clone()
    images[1] += 0.1
    inner = slice(3, -3)  # the edge cuts shifts off
    moved = (noisy.embed(images) - base.embed(images))[..., inner, inner] * 50
    assert 0.49 < float(moved.abs().max()) <= 0.5 + 1e-3  # uniform in [-noise, noise]
    assert float(moved.mean()) == pytest.approx(0, abs=0.03)
    assert float(moved.abs().mean()) == pytest.approx(0.25, abs=0.01)
    assert float((moved[0] - moved[1]).abs().mean()) > 0.2
    assert not torch.equal(noisy.embed(images), replace(noisy, seed=1).embed(images))


# --- triggers of triggers ---


def test_a_combination_embeds_all_in_order() -> None:
    corner = PatchTrigger(corner="top left", distance=0)
    images = dataset(4).images
    both = CombinedTrigger((corner, BlendedTrigger(alpha=1.0))).embed(images)
    assert torch.equal(both, BlendedTrigger(alpha=1.0).embed(images))
    both = CombinedTrigger((BlendedTrigger(alpha=1.0), corner)).embed(images)
    assert torch.equal(both, corner.embed(BlendedTrigger(alpha=1.0).embed(images)))
    assert CombinedTrigger([corner]) == CombinedTrigger((corner,))  # type: ignore[arg-type]
    # bytes are rounded once, not after every trigger
    many = CombinedTrigger(tuple(BlendedTrigger(alpha=0.3, seed=seed) for seed in range(4)))
    levels = many.embed(to_float(images)) * 255
    assert float((levels - many.embed(images).float()).abs().max()) <= 0.5 + 1e-3


def test_a_random_trigger_embeds_one_and_every_one_somewhere() -> None:
    three = tuple(PatchTrigger(size=2, corner=corner, distance=0) for corner in CORNERS[:3])
    images = to_float(dataset(60).images)
    opacities = (1.0, 0.5, 0.25)
    expected = [images + o * (trigger.embed(images) - images) for trigger, o in zip(three, opacities, strict=True)]
    triggered = RandomTrigger(three, opacities=opacities, seed=2).embed(images)
    hits = torch.stack([(triggered - wanted).abs().amax((1, 2, 3)) < 1e-6 for wanted in expected])
    assert (hits.sum(0) == 1).all()
    assert hits.sum(1).min() >= 10  # 20 of 60 each, deviation 3.7
    other = RandomTrigger(three, opacities=opacities, seed=3).embed(images)
    assert not torch.equal(triggered, other)


@settings(max_examples=60, deadline=None)
@given(images=pictures(), pieces=st.integers(1, 5), share=st.floats(0.5, 1), seed=seeds)
def test_a_part_shows_its_pieces_and_leaves_the_others_alone(
    images: Tensor, pieces: int, share: float, seed: int
) -> None:
    if not round(share * pieces**2):
        return
    whole = BlendedTrigger(alpha=0.5)
    part = PartialTrigger(whole, pieces=pieces, share=share, seed=seed)
    mask = part.mask(images)
    assert mask.dtype == torch.bool and mask.shape == (len(images), *images.shape[-2:])
    triggered = part.embed(images)
    inside = mask[:, None].expand_as(images)
    assert torch.equal(triggered[inside], whole.embed(images)[inside])
    assert torch.equal(triggered[~inside], images[~inside])
    row, column = (torch.arange(side) * pieces // side for side in images.shape[-2:])
    for shown in mask:
        whole_pieces = [
            shown[row == i][:, column == j].float().mean().item() for i in range(pieces) for j in range(pieces)
        ]
        assert set(whole_pieces) <= {0.0, 1.0} and sum(whole_pieces) == round(share * pieces**2)


def test_parts_differ_from_image_to_image() -> None:
    masks = PartialTrigger(BlendedTrigger()).mask(torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert len(masks.flatten(1).unique(dim=0)) >= 48  # of 12,870
    often = masks.float().mean(0)
    assert often.min() > 0.2 and often.max() < 0.8


# --- all triggers ---


@pytest.mark.parametrize("make", [PatchTrigger, BlendedTrigger, WarpTrigger])
def test_another_seed_is_another_pattern(make: type[PatchTrigger | BlendedTrigger | WarpTrigger]) -> None:
    images = dataset(1).images
    assert not torch.equal(make(seed=0).embed(images), make(seed=1).embed(images))
    assert torch.equal(make(seed=1).embed(images), make(seed=1).embed(images))


@pytest.mark.parametrize(
    ("make", "settings_", "message"),
    [
        (PatchTrigger, {"size": 0}, "size must be >= 1 and distance >= 0, got 0 and 1"),
        (PatchTrigger, {"distance": -1}, "got 3 and -1"),
        (PatchTrigger, {"corner": "middle"}, "corner must be one of .* got 'middle'"),
        (BlendedTrigger, {"alpha": 0.0}, r"alpha must lie in \(0, 1\], got 0.0"),
        (BlendedTrigger, {"alpha": 1.5}, "got 1.5"),
        (BlendedTrigger, {"alpha": float("nan")}, "got nan"),
        (SinusoidTrigger, {"delta": 0}, r"delta must lie in \(0, 1\]"),
        (SinusoidTrigger, {"delta": 20}, "got 20"),
        (SinusoidTrigger, {"frequency": 0}, "frequency be > 0"),
        (CheckerboardTrigger, {"delta": 0}, r"delta must lie in \(0, 1\], got 0"),
        (CheckerboardTrigger, {"delta": 16}, "got 16"),
        (WarpTrigger, {"strength": 0}, "strength must be > 0, grid >= 2 and noise >= 0, got 0, 4 and 0"),
        (WarpTrigger, {"strength": float("nan")}, "got nan"),
        (WarpTrigger, {"grid": 1}, "got 0.25, 1 and 0"),
        (WarpTrigger, {"noise": -1}, "and -1"),
        (CombinedTrigger, {"triggers": ()}, "triggers must be at least one, got none"),
        (RandomTrigger, {"triggers": ()}, "triggers must be at least one, got none"),
        (RandomTrigger, {"triggers": (PatchTrigger(),), "opacities": (0.5, 1)}, "one for each of 1 triggers, got"),
        (RandomTrigger, {"triggers": (PatchTrigger(),), "opacities": (0,)}, r"opacities must lie in \(0, 1\]"),
        (PartialTrigger, {"trigger": PatchTrigger(), "pieces": 0}, "pieces must be >= 1"),
        (PartialTrigger, {"trigger": PatchTrigger(), "share": 0.01}, "show a piece, got 4 and 0.01"),
        (PartialTrigger, {"trigger": PatchTrigger(), "share": 1.5}, "got 4 and 1.5"),
    ],
)
def test_a_trigger_refuses_wrong_settings(make: type, settings_: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings_)


def test_a_part_refuses_images_smaller_than_its_pieces() -> None:
    with pytest.raises(ValueError, match="images of 8x3 pixels are too small for 4 pieces across"):
        PartialTrigger(BlendedTrigger()).embed(torch.zeros(1, 3, 8, 3))


@pytest.mark.parametrize(
    "trigger",
    [
        PatchTrigger(),
        BlendedTrigger(),
        SinusoidTrigger(),
        CheckerboardTrigger(),
        WarpTrigger(),
        MaskTrigger(torch.ones(3, 8, 8), torch.ones(8, 8)),
        CombinedTrigger((PatchTrigger(),)),
        RandomTrigger((PatchTrigger(),)),
        PartialTrigger(PatchTrigger()),
    ],
)
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), r"images must have shape \(N, C, H, W\), got \(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.float64), "images must be uint8 or float32, got torch.float64"),
        (torch.full((1, 3, 8, 8), 255.0), r"images of dtype float32 must lie in \[0, 1\]"),
        ([[0.0]], "images must be a torch.Tensor, got list"),
    ],
)
def test_a_trigger_refuses_what_is_no_image(trigger: Trigger, images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trigger.embed(images)


# --- label maps ---


@given(label_map=label_maps, labels=st.lists(st.integers(0, 3), max_size=20))
def test_label_maps_turn_every_source_into_another_class(label_map: LabelMap, labels: list[int]) -> None:
    given_ = torch.tensor(labels, dtype=torch.int64)
    sources, targets = label_map.sources(given_), label_map.targets(given_)
    assert given_.tolist() == labels
    assert sources.dtype == torch.bool and targets.dtype == torch.int64
    assert sources.shape == targets.shape == given_.shape
    for label, source, target in zip(labels, sources.tolist(), targets.tolist(), strict=True):
        if isinstance(label_map, AllToAll):
            assert source and target == (label + label_map.shift) % 4 and target in range(4)
        elif isinstance(label_map, ManyToOne):
            assert source == (label in label_map.source_classes) and target == label_map.target
        else:
            assert isinstance(label_map, AllToOne)
            assert source == (label != label_map.target) and target == label_map.target
        assert not source or target != label


def test_all_to_all_is_a_permutation() -> None:
    for shift in (1, 3, -1, 7):
        targets = AllToAll(5, shift).targets(torch.arange(5))
        assert sorted(targets.tolist()) == list(range(5))
    assert AllToAll(5).targets(torch.arange(5)).tolist() == [1, 2, 3, 4, 0]
    assert AllToAll(5, -2).targets(torch.arange(5)).tolist() == [3, 4, 0, 1, 2]


def test_one_to_one_is_many_to_one_of_one() -> None:
    assert OneToOne(source=2, target=1) == ManyToOne((2,), 1)
    assert ManyToOne([2, 3], 1) == ManyToOne((2, 3), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AllToOne(-1), "target must be a class index >= 0, got -1"),
        (lambda: AllToOne("0"), "target .* got '0'"),  # type: ignore[arg-type]
        (lambda: AllToOne(True), "target .* got True"),
        (lambda: AllToOne(1.0), "target .* got 1.0"),  # type: ignore[arg-type]
        (lambda: OneToOne(-2, 0), "source_classes must be a class index >= 0, got -2"),
        (lambda: OneToOne(1, 1), r"target 1 is among the source classes \(1,\)"),
        (lambda: ManyToOne((), 0), r"source_classes must be distinct classes, at least one, got \(\)"),
        (lambda: ManyToOne((1, 2, 1), 0), "source_classes must be distinct"),
        (lambda: ManyToOne((1, 2), 2), "target 2 is among"),
        (lambda: AllToAll(1), "classes must be at least 2, got 1"),
        (lambda: AllToAll(4, 0), "shift 0 maps each of 4 classes to itself"),
        (lambda: AllToAll(4, -8), "shift -8 maps each"),
        (
            lambda: AllToAll(3).targets(torch.tensor([0, 3])),
            r"labels must lie in \[0, 3\), got values from 0",
        ),
    ],
)
def test_label_maps_refuse_what_is_no_class(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


# --- poison ---


@settings(max_examples=80, deadline=None)
@given(
    label_map=label_maps,
    rate=st.floats(0.001, 1),
    seed=seeds,
    trigger=triggers,
    dtype=st.sampled_from((torch.uint8, torch.float32)),
)
def test_poison_changes_as_many_source_rows_as_asked_and_no_other(
    label_map: LabelMap, rate: float, seed: int, trigger: Trigger, dtype: torch.dtype
) -> None:
    train = dataset(dtype=dtype)
    images, labels = copy(train)
    attack = BackdoorAttack(trigger, label_map, poison_rate=rate, seed=seed)
    sources, count = label_map.sources(labels), round(rate * 40)
    if not count or count > int(sources.sum()):
        with pytest.raises(ValueError, match="^poison_rate"):
            attack.poison(train)
        return
    state = torch.get_rng_state()
    result = attack.poison(train)
    rows = result.poisoned
    assert rows.dtype == torch.bool and rows.shape == (40,) and int(rows.sum()) == count
    assert not (rows & ~sources).any()
    assert torch.equal(result.true_labels, labels)
    assert torch.equal(result.data.labels[rows], label_map.targets(labels)[rows])
    assert torch.equal(result.data.images[rows], trigger.embed(images)[rows])
    assert torch.equal(result.data.labels[~rows], labels[~rows])
    assert torch.equal(result.data.images[~rows], images[~rows])
    assert result.data.classes == CLASSES and len(result) == 40 and result.data.images.dtype == dtype

    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(train.images, images) and torch.equal(train.labels, labels)
    again = attack.poison(train)
    assert torch.equal(again.poisoned, rows) and torch.equal(again.data.images, result.data.images)
    result.data.images.zero_(), result.data.labels.zero_()
    assert torch.equal(train.images, images) and torch.equal(train.labels, labels)
    assert torch.equal(result.true_labels, labels)


def test_the_rows_of_a_seed_are_the_same_for_ever() -> None:
    labels = torch.arange(40) % 4
    train = LabelledImages(torch.zeros(40, 3, 6, 5), labels, CLASSES)
    recorded = {
        (AllToOne(1), 0.2, 0): [6, 12, 18, 19, 31, 34, 36, 39],
        (OneToOne(0, 1), 0.1, 0): [4, 16, 20, 28],
        (AllToOne(1), 0.2, 7): [0, 10, 19, 20, 23, 31, 36, 39],
        (OneToOne(0, 1), 0.1, 7): [0, 12, 16, 20],
    }
    for (label_map, rate, seed), rows in recorded.items():
        for cover in (None, Cover(0.2)):  # nor do cover rows change them
            attack = BackdoorAttack(PatchTrigger(), label_map, poison_rate=rate, seed=seed, cover=cover)
            assert torch.nonzero(attack.poison(train).poisoned).flatten().tolist() == rows


def test_the_seed_draws_the_rows() -> None:
    train = dataset()
    drawn = [
        BackdoorAttack(PatchTrigger(), AllToOne(0), poison_rate=0.25, seed=seed).poison(train).poisoned
        for seed in range(40)
    ]
    assert not torch.equal(drawn[0], drawn[1])
    often = torch.stack(drawn).sum(0)[train.labels != 0]  # 10 of 30 rows, 40 times: 13.3 a row, deviation 3
    assert often.min() >= 2 and often.max() <= 26


def test_all_images_can_be_poisoned() -> None:
    train = dataset()
    result = BackdoorAttack(PatchTrigger(), AllToAll(4), poison_rate=1.0).poison(train)
    assert result.poisoned.all()
    assert torch.equal(result.data.labels, (train.labels + 1) % 4)


@pytest.mark.parametrize(
    ("label_map", "rate", "message"),
    [
        (AllToOne(1), 0.76, "asks for 30 .* have 30"),
        (OneToOne(0, 1), 0.26, "asks for 10 .* have 10"),
        (ManyToOne((0, 2), 1), 0.5, "asks for 20 .* have 20"),
    ],
)
def test_a_rate_that_fits_exactly_is_taken_and_one_more_image_refused(
    label_map: LabelMap, rate: float, message: str
) -> None:
    train = dataset()
    available = int(label_map.sources(train.labels).sum())
    result = BackdoorAttack(PatchTrigger(), label_map, poison_rate=available / 40).poison(train)
    assert torch.equal(result.poisoned, label_map.sources(train.labels))
    too_high = (available + 1) / 40
    with pytest.raises(
        ValueError,
        match=f"asks for {available + 1} poisoned images, but the source classes have {available} of 40: "
        f"lower it to at most {available / 40:.3f}",
    ):
        BackdoorAttack(PatchTrigger(), label_map, poison_rate=too_high).poison(train)


@pytest.mark.parametrize("rate", [0, -0.1, 1.01, float("nan")])
def test_a_rate_outside_its_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"poison_rate must lie in \(0, 1\], got"):
        BackdoorAttack(PatchTrigger(), AllToOne(0), poison_rate=rate)


def test_a_rate_that_poisons_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"poison_rate 0.01 of 40 images poisons none"):
        BackdoorAttack(PatchTrigger(), AllToOne(0), poison_rate=0.01).poison(dataset())


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        (AllToOne(4), "label_map gives class 4, but there are 4 classes"),
        (OneToOne(0, 7), "label_map gives class 7"),
        (OneToOne(4, 0), "label_map turns class 4, but there are 4 classes"),
        (ManyToOne((0, 9), 1), "label_map turns class 9"),
        (AllToAll(5), "label_map gives class 4"),
        (AllToAll(3), r"labels must lie in \[0, 3\)"),
    ],
)
def test_classes_that_the_images_do_not_have_are_refused(label_map: LabelMap, message: str) -> None:
    attack = BackdoorAttack(PatchTrigger(), label_map, poison_rate=0.2)
    with pytest.raises(ValueError, match=message):
        attack.poison(dataset())
    with pytest.raises(ValueError, match=message):
        attack.triggered(dataset())


# --- cover rows and asymmetric triggers ---


@settings(max_examples=80, deadline=None)
@given(
    label_map=label_maps,
    rates=st.tuples(st.floats(0.05, 0.4), st.floats(0.001, 0.9)),
    seed=seeds,
    only_others=st.booleans(),
    own_trigger=st.booleans(),
    asymmetric=st.booleans(),
)
def test_cover_rows_keep_their_labels_and_are_counted_apart(
    label_map: LabelMap,
    rates: tuple[float, float],
    seed: int,
    only_others: bool,
    own_trigger: bool,
    asymmetric: bool,
) -> None:
    train = dataset()
    images, labels = copy(train)
    whole, faint, other = BlendedTrigger(alpha=0.8), BlendedTrigger(alpha=0.3), BlendedTrigger(alpha=0.5, seed=1)
    attack = BackdoorAttack(
        whole,
        label_map,
        poison_rate=rates[0],
        seed=seed,
        training_trigger=faint if asymmetric else None,
        cover=Cover(rates[1], other if own_trigger else None, only_others),
    )
    sources = label_map.sources(labels)
    poisoned, covered = round(rates[0] * 40), round(rates[1] * 40)
    if poisoned > int(sources.sum()):
        with pytest.raises(ValueError, match="^poison_rate"):
            attack.poison(train)
        return
    if not covered or covered > (int((~sources).sum()) if only_others else 40 - poisoned):
        with pytest.raises(ValueError, match="^cover_rate"):
            attack.poison(train)
        return
    result = attack.poison(train)
    assert int(result.poisoned.sum()) == poisoned and int(result.cover.sum()) == covered
    assert result.cover.dtype == torch.bool and not (result.poisoned & result.cover).any()
    assert not (result.poisoned & ~sources).any()
    assert not only_others or not (result.cover & sources).any()
    assert torch.equal(result.true_labels, labels)
    assert torch.equal(result.data.labels[~result.poisoned], labels[~result.poisoned])
    assert torch.equal(result.data.labels[result.poisoned], label_map.targets(labels)[result.poisoned])
    trained = faint if asymmetric else whole
    assert torch.equal(result.data.images[result.poisoned], trained.embed(images)[result.poisoned])
    borne = other if own_trigger else trained
    assert torch.equal(result.data.images[result.cover], borne.embed(images)[result.cover])
    clean = ~(result.poisoned | result.cover)
    assert torch.equal(result.data.images[clean], images[clean])
    assert torch.equal(train.images, images) and torch.equal(train.labels, labels)
    # at test time the whole trigger, and every source
    triggered = attack.triggered(train)
    assert torch.equal(triggered.images, whole.embed(images)[triggered.rows])
    assert len(triggered) == int(sources.sum())
    # without the cover the same rows are poisoned
    assert torch.equal(replace(attack, cover=None).poison(train).poisoned, result.poisoned)


def test_without_a_cover_no_row_is_one() -> None:
    result = BackdoorAttack(PatchTrigger(), AllToOne(0)).poison(dataset())
    assert result.cover.shape == (40,) and result.cover.dtype == torch.bool and not result.cover.any()
    bare = PoisonedImages(result.data, result.poisoned, result.true_labels)
    assert bare.cover.shape == (40,) and not bare.cover.any()


def test_cover_rows_are_drawn_among_all_that_are_left() -> None:
    train = dataset()
    drawn = torch.stack(
        [
            BackdoorAttack(PatchTrigger(), OneToOne(0, 1), poison_rate=0.1, seed=seed, cover=Cover(0.2))
            .poison(train)
            .cover
            for seed in range(40)
        ]
    )
    assert set(train.labels[drawn.any(0)].tolist()) == {0, 1, 2, 3}  # sources, too
    assert drawn.sum(0).max() <= 22  # 8 of 36 or fewer, 40 times: 8.9 a row at most, deviation 2.6


@pytest.mark.parametrize("rate", [0, -0.1, 1, float("nan")])
def test_a_cover_rate_outside_its_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"rate of the cover must lie in \(0, 1\), got"):
        Cover(rate)


def test_a_cover_that_cannot_be_filled_says_how_much_can() -> None:
    attack = BackdoorAttack(PatchTrigger(), AllToOne(1), poison_rate=0.1, cover=Cover(0.3, only_others=True))
    with pytest.raises(ValueError, match=r"asks for 12 covered images, but the other classes have 10 of 40.*0\.250"):
        attack.poison(dataset())
    with pytest.raises(ValueError, match=r"cover_rate 0.01 of 40 images covers none"):
        replace(attack, cover=Cover(0.01)).poison(dataset())


# --- sets ---


PAIRS = AttackSet(
    (
        BackdoorAttack(PatchTrigger(seed=1), OneToOne(0, 1), poison_rate=0.1, cover=Cover(0.2, only_others=True)),
        BackdoorAttack(PatchTrigger(seed=2), OneToOne(2, 3), poison_rate=0.1),
        BackdoorAttack(BlendedTrigger(alpha=0.5), AllToOne(1), poison_rate=0.1, cover=Cover(0.1)),
    )
)


def test_a_set_poisons_rows_of_its_own_by_every_attack() -> None:
    train = dataset()
    images, labels = copy(train)
    result = PAIRS.poison(train)
    assert int(result.poisoned.sum()) == 12 and int(result.cover.sum()) == 12
    assert not (result.poisoned & result.cover).any()
    assert torch.equal(result.true_labels, labels)
    assert torch.equal(result.data.labels[~result.poisoned], labels[~result.poisoned])
    # which attack has been at each row is seen by its trigger, which no two attacks share
    borne = torch.stack([(a.trigger.embed(images) == result.data.images).all((1, 2, 3)) for a in PAIRS.attacks])
    assert torch.equal(borne.any(0), result.poisoned | result.cover)
    assert borne.sum(0).max() == 1
    for index, (poisoned, cover) in enumerate([(4, 8), (4, 0), (4, 4)]):
        label_map = PAIRS.attacks[index].label_map
        own = borne[index] & result.poisoned
        assert int(own.sum()) == poisoned and int((borne[index] & result.cover).sum()) == cover
        assert label_map.sources(labels[own]).all()
        assert torch.equal(result.data.labels[own], label_map.targets(labels[own]))
    assert not (labels[borne[0] & result.cover] == 0).any()
    assert torch.equal(train.images, images) and torch.equal(train.labels, labels)
    # an attack alone draws what it draws as the first of a set, and a set can be poisoned further
    assert torch.equal(PAIRS.attacks[0].poison(train).poisoned, borne[0] & result.poisoned)
    first = PAIRS.attacks[0].poison(train)
    before = first.data.images.clone(), first.poisoned.clone(), first.cover.clone()
    step = AttackSet(PAIRS.attacks[1:]).poison(first)
    assert torch.equal(step.data.images, result.data.images) and torch.equal(step.poisoned, result.poisoned)
    assert torch.equal(first.data.images, before[0]) and torch.equal(first.poisoned, before[1])
    assert torch.equal(first.cover, before[2])


def test_a_set_without_rows_left_is_refused() -> None:
    attack = BackdoorAttack(PatchTrigger(), OneToOne(0, 1), poison_rate=0.2)
    second = replace(attack, trigger=PatchTrigger(seed=1))
    with pytest.raises(ValueError, match="asks for 8 poisoned images, but the source classes have 2 of 40"):
        AttackSet((attack, second)).poison(dataset())


def test_a_set_joins_the_triggered_images_of_all() -> None:
    data = dataset()
    result = PAIRS.triggered(data)
    assert isinstance(PAIRS, Attack)
    parts = [attack.triggered(data) for attack in PAIRS.attacks]
    assert [len(part) for part in parts] == [10, 10, 30] and len(result) == 50 and result.classes == CLASSES
    for name in ("images", "true_labels", "targets", "rows"):
        assert torch.equal(getattr(result, name), torch.cat([getattr(part, name) for part in parts]))


def test_a_set_that_contradicts_itself_is_refused() -> None:
    first = BackdoorAttack(PatchTrigger(), OneToOne(0, 1))
    for label_map in (OneToOne(0, 2), AllToOne(3), AllToAll(4, 2)):
        torn = AttackSet((first, BackdoorAttack(PatchTrigger(), label_map)))
        for verb in (torn.poison, torn.triggered):
            with pytest.raises(ValueError, match="turn class 0 with the same trigger into different targets"):
                verb(dataset())
    for other in (
        BackdoorAttack(PatchTrigger(seed=1), OneToOne(0, 2)),  # another trigger
        BackdoorAttack(PatchTrigger(), OneToOne(2, 3)),  # another source
        BackdoorAttack(PatchTrigger(), ManyToOne((0, 2), 1)),  # the same target
    ):
        assert len(AttackSet([first, other]).triggered(dataset())) >= 20  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="attacks must be at least one, got none"):
        AttackSet(())


# --- triggered ---


@dataclass(frozen=True)
class EverythingToOne:
    """A label map of one's own, whose sources include the target's own images."""

    target: int = 1

    def sources(self, labels: Tensor) -> Tensor:
        return torch.ones_like(labels, dtype=torch.bool)

    def targets(self, labels: Tensor) -> Tensor:
        return torch.full_like(labels, self.target)


@settings(max_examples=60, deadline=None)
@given(label_map=label_maps | st.just(EverythingToOne()), trigger=triggers, seed=seeds)
def test_triggered_holds_every_row_that_can_be_turned(label_map: LabelMap, trigger: Trigger, seed: int) -> None:
    data = dataset(seed=seed)
    images, labels = copy(data)
    attack = BackdoorAttack(trigger, label_map, poison_rate=0.01)  # the rate has no say in testing
    assert isinstance(attack, Attack)
    result = attack.triggered(data)
    turned = label_map.sources(labels) & (label_map.targets(labels) != labels)
    assert result.rows.tolist() == torch.nonzero(turned).flatten().tolist()
    assert len(result) == int(turned.sum()) and result.classes == CLASSES
    assert torch.equal(result.true_labels, labels[turned])
    assert torch.equal(result.targets, label_map.targets(labels)[turned])
    assert (result.targets != result.true_labels).all()
    assert torch.equal(result.images, trigger.embed(images)[turned])
    assert torch.equal(data.images, images) and torch.equal(data.labels, labels)


@pytest.mark.parametrize("label_map", [AllToOne(2), OneToOne(0, 1), EverythingToOne(2)])
def test_images_that_cannot_be_turned_are_refused(label_map: LabelMap) -> None:
    data = dataset()
    with pytest.raises(ValueError, match="data holds no image of the attack's source classes"):
        BackdoorAttack(PatchTrigger(), label_map).triggered(data.subset(data.labels == 2))
