"""The text-to-image hybrid: attention masks, condition rotation, empty slots, sampling with a
cache, and the options of sampling.
"""

from dataclasses import replace

import pytest
import torch
from helpers import GENERATOR, K, stirred, tiny_generator, tiny_tokenizer

import gear
from gear.config import UserError
from gear.generator.model import Generator
from gear.generator.sampling import generate
from gear.generator.transformer import visible

CONFIG = replace(GENERATOR, text_slots=6, text_dim=5, dual_layers=1)
SEED = torch.Generator().manual_seed(0)
TOKENS = torch.randint(0, K, (3, 16), generator=SEED)
TEXT = torch.randn(3, 6, 5, generator=SEED)
RIGHT = torch.tensor(
    [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
).bool()  # padded on the right
NONE = (
    torch.randn(6, 5, generator=SEED),
    torch.tensor([1, 1, 0, 0, 0, 0]).bool(),
)  # the features of an empty text
MASKS = {"right": RIGHT, "left": RIGHT.flip(1)}


def hybrid(**changes):
    torch.manual_seed(0)
    generator = stirred(Generator(replace(CONFIG, **changes), K)).eval()
    generator.condition.no_caption = NONE
    return generator


# -- attention masks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text_attention", ("causal", "prefix"))
@pytest.mark.parametrize("side", MASKS)
def test_visible_is_its_rules(side, text_attention):
    """The rules are written out position by position."""
    mask, slots, tokens = MASKS[side], 6, 4
    actual = visible(mask, tokens, text_attention)
    assert actual.shape == (3, 1, 10, 10)
    for b in range(3):
        for i in range(10):
            for j in range(10):
                filled = j >= slots or bool(mask[b, j])
                before = j <= i or (text_attention == "prefix" and max(i, j) < slots)
                assert bool(actual[b, 0, i, j]) == (i == j or (filled and before)), (b, i, j)


@pytest.mark.parametrize("text_attention", ("causal", "prefix"))
@torch.no_grad()
def test_position_i_has_not_seen_token_i_and_text_sees_no_image(text_attention):
    generator, mask = hybrid(), MASKS["right"]
    before = generator.hidden(TOKENS, TEXT, [3], mask, text_attention)[3]
    for j in (0, 7, 15):
        other = TOKENS.clone()
        other[:, j] = (other[:, j] + 1) % K
        change = (
            (generator.hidden(other, TEXT, [3], mask, text_attention)[3] - before)
            .abs()
            .amax((0, 2))
        )
        assert change[: j + 1].max() < 1e-5 and (change[j + 1 :] > 1e-4).all()


@pytest.mark.parametrize("side", MASKS)
@torch.no_grad()
def test_what_stands_in_an_empty_slot_matters_to_nobody_else(side):
    """The content of an empty slot changes no other position. The last slot depends on itself,
    because it predicts token 0 whether it is filled or not.
    """
    generator, mask = hybrid(), MASKS[side]
    other = torch.where(mask[..., None], TEXT, TEXT + 3)
    other[:, -1] = TEXT[:, -1]
    torch.testing.assert_close(generator(TOKENS, other, mask), generator(TOKENS, TEXT, mask))
    filled = torch.where(mask[..., None], TEXT + 3, TEXT)
    assert (generator(TOKENS, filled, mask) - generator(TOKENS, TEXT, mask)).abs().amax(
        -1
    ).min() > 1e-4


@torch.no_grad()
def test_prefix_attention_lets_a_caption_look_ahead():
    generator, mask = hybrid(), MASKS["right"]
    causal, prefix = (generator(TOKENS, TEXT, mask, a) for a in ("causal", "prefix"))
    assert (causal - prefix)[2].abs().max() > 1e-3
    torch.testing.assert_close(causal[1], prefix[1])  # one filled slot has none ahead


# -- condition_rotation ----------------------------------------------------------------------------


@pytest.mark.parametrize("rotation, speaks", (("identity", True), ("zero", False)))
def test_text_keys_receive_gradient_unless_silenced(rotation, speaks):
    """With the zero rotation of the public networks, the query and key rows of a text stream never
    learn.
    """
    generator = hybrid(condition_rotation=rotation)
    generator(TOKENS, TEXT, MASKS["right"]).square().sum().backward()
    query, key, value = generator.blocks[0].attention.qkv_text.weight.grad.chunk(3)
    assert (
        (query.abs().max() > 0) == speaks
        and (key.abs().max() > 0) == speaks
        and value.abs().max() > 0
    )


# -- the streams -----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_dual_stream_layer_with_equal_streams_is_a_single_one():
    dual, single = hybrid(), hybrid(dual_layers=0)
    single.load_state_dict(
        {n: t for n, t in dual.state_dict().items() if "_text" not in n or n.startswith("text_")}
    )
    attention = dual.blocks[0].attention
    assert (dual(TOKENS, TEXT) - single(TOKENS, TEXT)).abs().max() > 1e-3
    attention.qkv_text.weight.copy_(attention.qkv.weight)
    attention.out_text.weight.copy_(attention.out.weight)
    dual.blocks[0].attention_norm_text.weight.copy_(dual.blocks[0].attention_norm.weight)
    torch.testing.assert_close(dual(TOKENS, TEXT), single(TOKENS, TEXT))


@torch.no_grad()
def test_hidden_is_a_hooks_output_from_the_last_slot_on():
    generator, outputs = hybrid(), {}
    for i, block in enumerate(generator.blocks, start=1):
        block.register_forward_hook(lambda module, inputs, output, i=i: outputs.update({i: output}))
    hidden = generator.hidden(TOKENS, TEXT, [0, 1, 3], MASKS["left"])
    assert sorted(hidden) == [0, 1, 3] and all(h.shape == (3, 16, 16) for h in hidden.values())
    assert torch.equal(hidden[1], outputs[1][:, 5:]) and torch.equal(hidden[3], outputs[3][:, 5:])
    assert torch.equal(hidden[0][:, 1:], generator.embedding[TOKENS[:, :-1]])


@torch.no_grad()
def test_soft_embeddings_are_taken_where_indices_are():
    generator = hybrid()
    onehot = torch.nn.functional.one_hot(TOKENS, K).float() @ generator.embedding
    torch.testing.assert_close(generator(onehot, TEXT, RIGHT), generator(TOKENS, TEXT, RIGHT))


def test_a_dropped_caption_is_none():
    generator = hybrid()
    dropped = torch.tensor([True, False, True])
    with torch.no_grad():
        none, with_captions = (
            generator(TOKENS, *generator.condition.none(TEXT, RIGHT)),
            generator(TOKENS, TEXT, RIGHT),
        )
        assert (with_captions - none).abs().max() > 1e-3
        actual = generator.train()(TOKENS, TEXT, RIGHT, dropped=dropped)
        torch.testing.assert_close(actual, torch.where(dropped[:, None, None], none, with_captions))


def test_a_dropped_caption_takes_its_mask_with_it():
    generator = hybrid()
    generator.condition.no_caption = torch.zeros(2, 5), torch.zeros(2, dtype=torch.bool)
    text, mask = torch.ones(40, 2, 5), torch.ones(40, 2, dtype=torch.bool)
    left, filled = generator.condition.drop(text, mask, torch.arange(40) % 3 == 0)
    assert torch.equal(filled[:, 0], left[:, 0, 0] > 0) and (~filled).sum() == 2 * 14


# -- sampling --------------------------------------------------------------------------------------


def uncached(generator, text, mask, text_attention, cfg_scale, interval, none):
    indices = torch.zeros(len(text), 16, dtype=torch.long)
    for i in range(16):
        logits = generator(indices, text, mask, text_attention)[:, i]
        if cfg_scale != 1 and interval[0] <= i < interval[1]:
            uncond = generator(indices, *none, text_attention)[:, i]
            logits = uncond + cfg_scale * (logits - uncond)
        indices[:, i] = logits.argmax(-1)
    return indices.view(-1, 4, 4)


@pytest.mark.parametrize("rotation", ("identity", "zero"))
@pytest.mark.parametrize("side, text_attention, cfg_scale, interval", (
    ("right", "causal", 1.0, (0, 16)),
    ("left", "causal", 3.0, (0, 16)),
    ("right", "prefix", 3.0, (4, 9)),
    ("left", "causal", 0.0, (0, 16)),
    ("right", "prefix", 0.0, (4, 9)),
    ("left", "causal", 0.5, (0, 16)),
    ("left", "prefix", 3.0, (0, 5)),
))  # fmt: skip
@torch.no_grad()
def test_cached_generation_is_the_uncached_arg_max_loop(
    side, text_attention, cfg_scale, interval, rotation
):
    generator, mask = hybrid(condition_rotation=rotation), MASKS[side]
    expected = uncached(
        generator,
        TEXT,
        mask,
        text_attention,
        cfg_scale,
        interval,
        generator.condition.none(TEXT, mask),
    )
    actual = generate(
        generator,
        TEXT,
        (4, 4),
        mask,
        cfg_scale=cfg_scale,
        cfg_interval=interval,
        temperature=0,
        text_attention=text_attention,
    )
    assert torch.equal(actual, expected) and len(actual.unique()) > 2


def test_what_no_caption_is_has_to_be_told():
    """Guidance and dropping need the features of an empty text; a network without biases would map
    zeros to zeros.
    """
    generator = hybrid()
    generator.condition.no_caption = None
    generate(generator, TEXT, (4, 4), RIGHT)  # the unconditional half is not computed
    for call in (
        lambda: generate(generator, TEXT, (4, 4), RIGHT, cfg_scale=2.0),
        lambda: generate(generator, TEXT, (4, 4), RIGHT, cfg_scale=0.5),
        lambda: generate(generator, TEXT, (4, 4), RIGHT, cfg_scale=0.0),
        lambda: generator(TOKENS, TEXT, RIGHT, dropped=torch.tensor([True, False, False])),
    ):
        with pytest.raises(UserError, match="Set generator.condition.no_caption"):
            call()
    generator.condition.no_caption = NONE[0][:4], NONE[1][:4]
    with pytest.raises(UserError, match="as many slots"):
        generator(TOKENS, TEXT, RIGHT, dropped=torch.tensor([True, False, False]))


def test_dropped_captions_leave_deep_gradients_finite():
    """The network has 36 layers, as the 1B has: each would multiply the gradient of a stream of
    exact zeros by 316.
    """
    torch.manual_seed(0)
    generator = Generator(replace(CONFIG, layers=36, dual_layers=12), K).train()
    torch.nn.init.normal_(generator.head.weight, 0, 0.02)
    generator.condition.no_caption = NONE
    dropped = torch.tensor([True, False, True])
    logits = generator(TOKENS, TEXT, RIGHT, dropped=dropped)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.flatten()).backward()
    assert all(torch.isfinite(p.grad).all() for p in generator.parameters())


@pytest.mark.parametrize("interval", ((0, 16), (3, 16), (0, 7), (5, 5), (9, 99)))
@torch.no_grad()
def test_guidance_interval_for_classes(interval):
    generator, labels = tiny_generator(), torch.tensor([0, 3, 4])
    indices = torch.zeros(3, 16, dtype=torch.long)
    for i in range(16):
        logits = generator(indices, labels)[:, i]
        if interval[0] <= i < interval[1]:
            none = generator(indices, torch.full_like(labels, generator.condition.no_class))[:, i]
            logits = none + 3 * (logits - none)
        indices[:, i] = logits.argmax(-1)
    actual = generate(
        generator, labels, (4, 4), cfg_scale=3.0, cfg_interval=interval, temperature=0
    )
    assert torch.equal(actual.flatten(1), indices)


def test_bfloat16_weights_and_cache_leave_the_generator_as_it_was():
    generator, labels = tiny_generator(), torch.tensor([0, 3])
    samples = generate(generator, labels, (4, 4), seed=1, dtype=torch.bfloat16)
    assert generator.embedding.dtype == torch.float32 and samples.shape == (2, 4, 4)
    assert torch.equal(samples, generate(generator, labels, (4, 4), seed=1, dtype=torch.bfloat16))
    many = torch.arange(5).repeat(40)
    exact, rounded = (
        generate(generator, many, (4, 4), temperature=0, dtype=d) for d in (None, torch.bfloat16)
    )
    assert not torch.equal(exact, rounded)  # bfloat16 gives other logits
    with torch.no_grad():  # the distribution is close to float32's: logits of the first token differ in the third digit
        exact = generator(torch.zeros(2, 16, dtype=torch.long), labels)
        rounded = generator.to(torch.bfloat16)(torch.zeros(2, 16, dtype=torch.long), labels)
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()


def test_sample_takes_captions_and_the_grid_a_generator_brings():
    generator, tokenizer = hybrid(), tiny_tokenizer(codebook_size=K)
    generator.grid = (4, 4)
    pictures = gear.sample(generator, tokenizer, TEXT, mask=RIGHT, cfg_scale=2.0, seed=3)
    assert pictures.shape == (3, 16, 16, 3) and pictures.dtype == torch.uint8
    assert torch.equal(
        pictures, gear.sample(generator, tokenizer, TEXT, (4, 4), mask=RIGHT, cfg_scale=2.0, seed=3)
    )


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, mask, message",
    [
        (
            torch.zeros(3, 7, 5),
            None,
            "a caption of 7 tokens is longer than the 6 slots: cut it to 6",
        ),
        (torch.zeros(3, 6, 4), None, r"features \(B, T, 5\) are expected, not \(3, 6, 4\)"),
        (torch.zeros(3, dtype=torch.long), None, "conditioned on captions"),
        (TEXT, RIGHT[:, :4], r"the mask is \(3, 4\) torch.bool, the captions have \(3, 6\) slots"),
        (TEXT, torch.zeros(3, 6), "the mask is .* torch.float32"),
        (TEXT[:, :0], None, "conditioned on captions"),
    ],
)
def test_captions_that_do_not_fit(text, mask, message):
    for call in (lambda g: g(TOKENS, text, mask), lambda g: generate(g, text, (4, 4), mask)):
        with pytest.raises(UserError, match=message):
            call(hybrid())


def test_labels_with_a_mask_or_features_for_a_class():
    for condition, mask in ((torch.tensor([0, 1, 2]), RIGHT), (TEXT, None)):
        with pytest.raises(UserError, match="conditioned on a class: give it one label per image"):
            tiny_generator()(TOKENS, condition, mask)


def test_an_attention_that_does_not_exist():
    for call in (
        lambda g: g(TOKENS, TEXT, RIGHT, "Prefix"),
        lambda g: generate(g, TEXT, (4, 4), RIGHT, text_attention="full"),
    ):
        with pytest.raises(UserError, match="'causal' or 'prefix' is expected"):
            call(hybrid())
