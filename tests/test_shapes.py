"""The embedded shapes teacher: its scenes, its grader, the identities its training rests on, and what it draws."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.shapes import draw as scenery
from tests.shapes.draw import COLOURS, PLACES, SHAPES, SIZES, Scene, draw, parse
from tests.shapes.evaluate import draw_captions, open_teacher
from tests.shapes.fast_attention import padding_bias, use_fast_attention
from tests.shapes.flat_vae import decode, encode, flatten, new_vae, restore
from tests.shapes.grade import grade
from tests.shapes.text import MAX_TOKENS, write_tokenizer
from tests.shapes.train_flow import new_transformer

CONFIGS = Path(__file__).parents[1] / "configs"
TEACHER = CONFIGS / "teachers" / "shapes"
ATTRIBUTES = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "place": PLACES, "background": COLOURS}
BOX_BLUR = 3


@pytest.fixture(scope="module")
def some_scenes() -> list[Scene]:
    return scenery.shuffled(list(scenery.scenes()), seed=5)[:500]


def softened(image: np.ndarray) -> np.ndarray:
    """Every pixel the mean of its nine neighbours: softer than any decoder of ours."""
    padded = np.pad(image.astype(float), ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = image.shape[:2]
    moved = [padded[i : i + height, j : j + width] for i in range(BOX_BLUR) for j in range(BOX_BLUR)]
    return np.rint(np.mean(moved, axis=0)).astype(np.uint8)


def wrong_in(scene: Scene, attribute: str, pick: int) -> Scene:
    others = [
        dataclasses.replace(scene, **{attribute: value})
        for value in ATTRIBUTES[attribute]
        if value != getattr(scene, attribute)
    ]
    possible = [other for other in others if other.colour != other.background]
    return possible[pick % len(possible)]


@pytest.mark.parametrize("treated", [lambda image: image, softened], ids=["sharp", "soft"])
def test_grader_accepts_true_scenes(some_scenes, treated):
    refused = [s.caption for i, s in enumerate(some_scenes) if not grade(treated(draw(s, 900 + i)), s.caption).all]
    assert len(refused) < 0.01 * len(some_scenes), refused


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_grader_sees_the_one_attribute_that_is_wrong(some_scenes, attribute):
    misread = []
    for i, scene in enumerate(some_scenes):
        shown = wrong_in(scene, attribute, pick=i)
        found = dataclasses.asdict(grade(draw(shown, seed=i), scene.caption))
        if [name for name, right in found.items() if not right] != [attribute]:
            misread.append((scene.caption, shown.caption, found))
    assert len(misread) < 0.01 * len(some_scenes), misread[:3]


def test_grader_refuses_an_empty_picture_a_second_shape_and_a_mixed_colour():
    caption = "a small red square at the left on a white background"
    scene = parse(caption)
    empty = np.full((128, 128, 3), COLOURS["white"], np.uint8)
    assert dataclasses.asdict(grade(empty, caption)) == {
        "background": True, "colour": False, "shape": False, "place": False, "size": False
    }  # fmt: skip
    two = np.minimum(draw(scene, 1), draw(dataclasses.replace(scene, place="at the right"), 2))
    assert not grade(two, caption).all
    between = (draw(scene, 1).astype(int) + draw(dataclasses.replace(scene, colour="green"), 1)) // 2
    assert not grade(between.astype(np.uint8), caption).colour


def test_float_and_byte_pictures_grade_alike(some_scenes):
    for i, scene in enumerate(some_scenes[:20]):
        image, other = draw(scene, i), some_scenes[i + 1].caption
        assert grade(image / 255.0, other) == grade(image, other)


@pytest.mark.parametrize("text", ["", "a cat", "a small pink star at the left on a blue background"])
def test_a_foreign_caption_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"not a caption of a scene.*say for example"):
        parse(text)


def test_a_picture_is_a_function_of_its_seed():
    scene = next(scenery.scenes())
    assert (draw(scene, 3) == draw(scene, 3)).all()
    assert (draw(scene, 3) != draw(scene, 4)).any()


def test_held_out_scenes_stay_out_of_training_and_their_pairs_do_not():
    known = scenery.training_scenes()
    assert not {*scenery.held_out_scenes(), *scenery.held_out_pair_scenes()} & {*known}
    assert not {(s.colour, s.shape) for s in known} & scenery.HELD_OUT_PAIRS
    for one, other in (("colour", "shape"), ("shape", "place"), ("size", "shape"), ("colour", "background")):
        seen = {(getattr(s, one), getattr(s, other)) for s in known}
        assert {(getattr(s, one), getattr(s, other)) for s in scenery.held_out_scenes()} <= seen


def test_prompt_lists_are_the_ones_that_the_code_writes(tmp_path):
    scenery.write_prompt_lists(tmp_path)
    lists = {}
    for name, count in (("shapes.txt", 400), ("shapes_heldout.txt", 256)):
        lists[name] = (CONFIGS / "prompts" / name).read_text(encoding="utf-8")
        assert lists[name] == (tmp_path / name).read_text(encoding="utf-8")
        assert len(set(lists[name].splitlines())) == count
    assert not set(lists["shapes.txt"].splitlines()) & set(lists["shapes_heldout.txt"].splitlines())


def test_tokenizer_returns_every_text_and_knows_no_unknown():
    tokenizer = AutoTokenizer.from_pretrained(TEACHER / "tokenizer")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    for text in ("a large ring in the centre", "画一只猫 🐈 ok", "naïve café, 3 × 4?", "<tag> & \\ {x}", "Ω\u200bж"):
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert {len(tokenizer(scene.caption).input_ids) for scene in scenery.scenes()} == {12}
    padded = tokenizer("", padding="max_length", max_length=MAX_TOKENS, truncation=True)
    assert padded.input_ids == [1] + [0] * (MAX_TOKENS - 1) and sum(padded.attention_mask) == 1


def test_tokenizer_in_the_folder_is_the_one_that_the_recipe_writes(tmp_path):
    write_tokenizer(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (TEACHER / "tokenizer" / path.name).read_bytes()


def test_thirteen_keys_say_what_five_hundred_and_twelve_do():
    torch.manual_seed(0)
    stock, fast = new_transformer(32), new_transformer(32)
    fast.load_state_dict(stock.state_dict())
    text = use_fast_attention(fast)
    num_tokens = torch.tensor([12, 1, 7])
    rows = torch.randn(3, 13, 32)  # the rows between the text and the last one must be ignored
    rows[:, -1] = 0
    padded = torch.zeros(3, MAX_TOKENS, 32)
    padded[:, :13] = rows * (torch.arange(13)[None] < num_tokens[:, None])[..., None]
    latents, timesteps = torch.randn(3, 16, 1, 8, 8), torch.tensor([990.0, 500.0, 20.0])
    with torch.no_grad():
        text.bias = padding_bias(num_tokens, 12)
        found = fast(latents, timesteps, rows, return_dict=False)[0]
        expected = stock(latents, timesteps, padded, return_dict=False)[0]
        text.bias = padding_bias(torch.full((3,), 12), 12)
        blind = fast(latents, timesteps, rows, return_dict=False)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (blind - expected).abs().max() > 1e-4  # and not because the text has no effect


def test_flat_vae_and_restored_vae_are_the_same_network_at_one_frame():
    torch.manual_seed(1)
    flat, images = flatten(new_vae()), torch.rand(2, 3, 1, 32, 32) * 2 - 1
    whole = restore(flat.state_dict(), new_vae())
    with torch.no_grad():
        mean, _ = encode(flat, images)
        torch.testing.assert_close(mean, whole.encode(images).latent_dist.mean, atol=1e-5, rtol=0)
        torch.testing.assert_close(decode(flat, mean).clamp(-1, 1), whole.decode(mean).sample, atol=1e-5, rtol=0)


def test_folder_is_small_and_holds_no_pickle():
    files = [path for path in TEACHER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert all(path.name.endswith(".fp16.safetensors") for path in files if path.suffix == ".safetensors")
    assert sum(path.stat().st_size for path in files) <= 30_000_000


@pytest.fixture(scope="module")
def teacher():
    return open_teacher(TEACHER)


def test_stock_pipeline_loads_every_weight(teacher):
    for part in (teacher.transformer, teacher.transformer_2, teacher.vae, teacher.text_encoder):
        for name, parameter in part.named_parameters():
            assert parameter.dtype == torch.float32 and not parameter.is_meta, name
            assert torch.isfinite(parameter).all(), name
    shared = teacher.text_encoder.shared.weight
    assert shared.abs().sum() > 0 and teacher.text_encoder.encoder.embed_tokens.weight is shared
    assert teacher.config.boundary_ratio == 0.8


def test_teacher_draws_held_out_captions(teacher):
    captions = [scene.caption for scene in scenery.held_out_scenes()[:8]]
    images = draw_captions(teacher, captions)
    right = [grade(image, caption).all for image, caption in zip(images, captions, strict=True)]
    assert sum(right) >= 6, list(zip(captions, right, strict=True))
    mismatched = [grade(image, caption).all for image, caption in zip(images, captions[1:] + captions[:1], strict=True)]
    assert sum(mismatched) == 0
