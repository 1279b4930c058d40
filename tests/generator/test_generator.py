"""Causality, the tap layer, 2-D RoPE, and sampling compared with a loop without a cache."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import GENERATOR, K, tiny_generator, tiny_state, tiny_tokenizer

from gear.config import UserError
from gear.generator import sampling
from gear.generator.config import GeneratorConfig
from gear.generator.model import Generator, Projector
from gear.generator.sampling import filter_logits, generate, sample, sampling_dtype
from gear.generator.transformer import Attention, KVCache, RMSNorm, rotate, rotation_table
from gear.images import to_uint8

L = 16
TOKENS = torch.randint(0, K, (3, L), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, 4])


@pytest.fixture
def generator():
    return tiny_generator()


# -- the model (Eq. 3) -----------------------------------------------------------------------------


@pytest.mark.parametrize("j", (0, 1, 7, 14, 15))
@torch.no_grad()
def test_position_i_has_not_seen_token_i(generator, j):
    """Changing token j leaves the logits at positions up to j unchanged, and changes every later
    one; the last token is never an input.
    """
    other = TOKENS.clone()
    other[:, j] = (other[:, j] + 1) % K
    change = (generator(other, LABELS) - generator(TOKENS, LABELS)).abs().amax((0, 2))
    assert change[: j + 1].max() < 1e-6 and (change[j + 1 :] > 1e-4).all()


@torch.no_grad()
def test_the_class_reaches_every_position(generator):
    change = (generator(TOKENS, LABELS) - generator(TOKENS, LABELS.flip(0))).abs().amax(2)
    assert (change[[0, 2]] > 1e-4).all() and change[1].max() == 0


def test_the_first_loss_is_ln_k():
    logits = Generator(GENERATOR, K)(TOKENS, LABELS)
    assert F.cross_entropy(logits.flatten(0, 1), TOKENS.flatten()).item() == pytest.approx(
        math.log(K), abs=1e-6
    )


@torch.no_grad()
def test_indices_grids_embeddings_and_one_hot_rows_are_the_same_tokens(generator):
    expected = generator(TOKENS, LABELS)
    assert expected.dtype == torch.float32 and expected.shape == (3, L, K)
    torch.testing.assert_close(generator(TOKENS.view(3, 4, 4), LABELS), expected)
    torch.testing.assert_close(generator(generator.embedding[TOKENS], LABELS), expected)
    torch.testing.assert_close(
        generator(F.one_hot(TOKENS, K).float() @ generator.embedding, LABELS), expected
    )


@torch.no_grad()
def test_hidden_at_layer_l_is_the_output_of_block_l(generator):
    outputs = {}
    for i, block in enumerate(generator.blocks, start=1):
        block.register_forward_hook(lambda module, inputs, output, i=i: outputs.update({i: output}))
    hidden = generator.hidden(TOKENS, LABELS, [0, 1, 2, 3])
    for i in (1, 2, 3):
        assert torch.equal(hidden[i], outputs[i])
    assert torch.equal(hidden[0][:, 0], generator.class_embedding(LABELS))
    assert torch.equal(hidden[0][:, 1:], generator.embedding[TOKENS[:, :-1]])
    torch.testing.assert_close(generator.logits(hidden[3]), generator(TOKENS, LABELS))


@pytest.mark.parametrize("layers, run", (([0], 0), ([1], 1), ([2, 0], 2), ([1, 3], 3)))
@torch.no_grad()
def test_no_block_above_the_highest_layer_asked_runs(generator, layers, run):
    calls = []
    for i, block in enumerate(generator.blocks, start=1):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    assert sorted(generator.hidden(TOKENS, LABELS, layers)) == sorted(layers)
    assert calls == list(range(1, run + 1))


@pytest.mark.parametrize("layers", ([4], [-1], [1, 9]))
def test_a_layer_that_is_not_there_says_which_are(generator, layers):
    with pytest.raises(UserError, match="this generator has layers 0 to 3"):
        generator.hidden(TOKENS, LABELS, layers)


@pytest.mark.parametrize("length", (6, 15, 17))
def test_a_length_that_is_no_square_is_an_error(generator, length):
    with pytest.raises(UserError, match=f"a sequence of {length} tokens is not a square grid"):
        generator(torch.zeros(1, length, dtype=torch.long), LABELS[:1])
    with pytest.raises(UserError, match=f"a grid of 1 x {length} tokens is not square"):
        generate(generator, LABELS, (1, length))


def test_a_grid_that_is_no_square_is_an_error_even_if_its_length_is(generator):
    with pytest.raises(UserError, match="2 x 8 tokens is not square"):
        generate(generator, LABELS, (2, 8))
    with pytest.raises(UserError, match="2 x 8 tokens is not square"):
        generator(torch.zeros(1, 2, 8, dtype=torch.long), LABELS[:1])


def test_a_head_width_that_2d_rope_cannot_halve_twice_is_an_error():
    with pytest.raises(UserError, match="divisible by 4"):
        Generator(GeneratorConfig(width=36, heads=6), 8)


@torch.no_grad()
def test_a_dropped_label_is_none():
    """Where a label is dropped the generator sees "no class", whatever the label, in training and
    in evaluation.
    """
    generator = tiny_generator()
    labelled, none = (
        generator(TOKENS, labels)
        for labels in (LABELS, torch.full((3,), generator.condition.no_class))
    )
    assert (labelled - none).abs().max() > 1e-3 and generator.condition.no_class == 5
    dropped = torch.tensor([True, False, True])
    for training in (True, False):
        actual = generator.train(training)(TOKENS, LABELS, dropped=dropped)
        torch.testing.assert_close(actual, torch.where(dropped[:, None, None], none, labelled))
        torch.testing.assert_close(generator(TOKENS, LABELS), labelled)


def test_the_share_of_dropped_labels_is_class_dropout():
    state = tiny_state(batch_size=4000)
    state.config = replace(
        state.config, generator=replace(state.config.generator, class_dropout=0.3)
    )
    torch.manual_seed(0)
    assert state._dropped(4000, None).float().mean().item() == pytest.approx(0.3, abs=0.03)
    state.config = replace(
        state.config, generator=replace(state.config.generator, class_dropout=0.0)
    )
    assert state._dropped(4000, None) is None


@pytest.mark.parametrize("config, count", (
    (GeneratorConfig(width=768, layers=12, heads=12), 110_888_448),
    (GeneratorConfig(width=384, layers=12, heads=12), 34_210_560),
    (GeneratorConfig(), 342_910_976),
))  # fmt: skip
def test_public_sizes(config, count):
    """LlamaGen-B, -S and -L, with 16,384 codes, have the public numbers of parameters."""
    with torch.device("meta"):
        assert sum(p.numel() for p in Generator(config, 16_384).parameters()) == count


def test_projector_size():
    """The projector from GEAR-L to DINOv2-B has 7,869,184 parameters."""
    with torch.device("meta"):
        assert sum(p.numel() for p in Projector(GeneratorConfig(), 768).parameters()) == 7_869_184


# -- the parts -------------------------------------------------------------------------------------


def test_rotation_table_is_row_angles_then_column_angles():
    """A plain loop gives the same table: pair m < d/4 is rotated by r * 10000^(-4m/d), and pair d/4
    + m by c times the same.
    """
    side, d = 3, 8
    table = rotation_table(side, d)
    assert table.shape == (1 + side * side, d // 2, 2)
    for r in range(side):
        for c in range(side):
            for m in range(d // 4):
                frequency = 10_000 ** (-4 * m / d)
                for pair, position in ((m, r), (d // 4 + m, c)):
                    expected = [math.cos(position * frequency), math.sin(position * frequency)]
                    assert table[1 + r * side + c, pair].tolist() == pytest.approx(
                        expected, abs=1e-6
                    )


def test_rotation_keeps_norms_and_products_depend_on_the_grid_offset_alone():
    side, d = 5, 16
    table = rotation_table(side, d)[1:]
    q, k = torch.randn(2, d, generator=torch.Generator().manual_seed(0))
    q, k = (rotate(x.expand(1, 1, side * side, d), table)[0, 0] for x in (q, k))
    for x in (q, k):
        torch.testing.assert_close(x.norm(dim=-1), x[0].norm().expand(side * side))
    by_offset = {}
    position = [divmod(i, side) for i in range(side * side)]
    for i, row in enumerate((q @ k.T).tolist()):
        for j, product in enumerate(row):
            by_offset.setdefault(
                (position[i][0] - position[j][0], position[i][1] - position[j][1]), []
            ).append(product)
    assert len(by_offset) == 81 and all(max(v) - min(v) < 1e-4 for v in by_offset.values())
    means = sorted(sum(v) / len(v) for v in by_offset.values())
    assert min(b - a for a, b in zip(means, means[1:])) > 1e-5  # offsets differ


def test_rotation_turns_interleaved_pairs():
    quarter = torch.tensor(
        [[[0.0, 1.0], [1.0, 0.0]]]
    )  # pair 0 is rotated by 90 degrees, pair 1 is not
    assert rotate(
        torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4), quarter
    ).flatten().tolist() == [-2, 1, 3, 4]


def test_the_condition_is_left_unturned_or_silenced():
    x = torch.randn(1, 2, 1, 8)
    assert torch.equal(rotate(x, rotation_table(2, 8)[:1]), x)
    assert (rotate(x, rotation_table(2, 8, condition_rotation="zero")[:1]) == 0).all()


@pytest.mark.parametrize("rotation, matters", (("zero", False), ("identity", True)))
@torch.no_grad()
def test_the_key_of_a_silenced_condition_does_not_matter(rotation, matters):
    """Channel 0 belongs to the condition alone: the row of the key projection that reads it matters
    under "identity" only.
    """
    attention, x = (
        Attention(16, 2, 0.0),
        torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)),
    )
    x[:, 1:, 0] = 0
    table = rotation_table(2, 8, condition_rotation=rotation)
    before = attention(x, table)
    attention.qkv.weight[16:32, 0] += 5  # rows 16 to 32 project to the keys
    assert ((attention(x, table) - before).abs().max() > 1e-3) == matters


@torch.no_grad()
def test_attention_with_a_cache_is_attention_without():
    attention, x, table = Attention(16, 2, 0.0), torch.randn(2, 9, 16), rotation_table(3, 8)[:9]
    cache = KVCache(2, 2, 9, 8, "cpu", torch.float32)
    parts = [
        attention(x[:, a:b], table[a:b], cache)
        for a, b in ((0, 4), (4, 5), (5, 6), (6, 7), (7, 8), (8, 9))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), attention(x, table))


@pytest.mark.parametrize("width", (16, 192, 1024))
def test_rms_norm_is_its_formula_with_its_gradients(width, device):
    """The results are equal bit for bit in float32 on a CPU, so that a run resumes with the numbers
    of its start, and within rounding on a GPU.
    """
    norm, x = RMSNorm(width).to(device), torch.randn(3, 7, width, device=device)
    torch.nn.init.normal_(norm.weight)
    formula = lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * norm.weight
    results = []
    for function in (norm, formula):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [leaf, norm.weight])])
    for mine, theirs in zip(*results):
        torch.testing.assert_close(
            mine, theirs, **({"rtol": 0, "atol": 0} if device == "cpu" else {})
        )


# -- sampling --------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(generator, labels, side, cfg_scale=1.0):
    """Return the arg-max of a full forward for every token, without a cache."""
    indices = torch.zeros(len(labels), side * side, dtype=torch.long, device=labels.device)
    for i in range(side * side):
        logits = generator(indices, labels)[:, i]
        if cfg_scale != 1:
            none = generator(indices, torch.full_like(labels, generator.condition.no_class))[:, i]
            logits = none + cfg_scale * (logits - none)
        indices[:, i] = logits.argmax(-1)
    return indices.view(-1, side, side)


@pytest.mark.parametrize("rotation", ("identity", "zero"))
@pytest.mark.parametrize("cfg_scale", (0.0, 0.3, 1.0, 3.0))
def test_cached_generation_is_the_uncached_arg_max_loop(cfg_scale, rotation, device):
    generator, labels = tiny_generator(condition_rotation=rotation).to(device), LABELS.to(device)
    settings = dict(cfg_scale=cfg_scale, temperature=0, dtype=torch.float32)
    for _ in range(2):  # on a GPU the second call uses a graph
        actual = generate(generator, LABELS, (4, 4), **settings)
        assert torch.equal(actual, greedy(generator, labels, 4, cfg_scale))
    assert len(actual.unique()) > 3  # the samples do not repeat one code


def test_guidance_changes_the_sample_and_needs_a_null_class_that_differs(generator):
    plain, guided = (
        generate(generator, LABELS, (4, 4), cfg_scale=s, temperature=0) for s in (1.0, 3.0)
    )
    assert not torch.equal(plain, guided)
    generator.class_embedding.weight.data[:] = generator.class_embedding.weight.data[3]
    plain, guided = (
        generate(generator, LABELS, (4, 4), cfg_scale=s, temperature=0) for s in (1.0, 3.0)
    )
    assert torch.equal(plain, guided)


def test_scale_zero_is_unconditional_and_scales_below_one_lie_between(generator):
    """Scale 0 gives the samples of no class, whatever the label; from 0 to 1, the probabilities are
    those of the formula.
    """
    unconditional = greedy(generator, torch.full_like(LABELS, generator.condition.no_class), 4)
    assert torch.equal(
        generate(generator, LABELS, (4, 4), cfg_scale=0, temperature=0), unconditional
    )
    assert not torch.equal(generate(generator, LABELS, (4, 4), temperature=0), unconditional)
    for interval in ((0, 7), (4, 16)):  # both halves are computed
        indices = torch.zeros(len(LABELS), 16, dtype=torch.long)
        for i in range(16):
            labels = (
                torch.full_like(LABELS, generator.condition.no_class)
                if interval[0] <= i < interval[1]
                else LABELS
            )
            indices[:, i] = generator(indices, labels)[:, i].argmax(-1)
        actual = generate(
            generator, LABELS, (4, 4), cfg_scale=0, cfg_interval=interval, temperature=0
        )
        assert torch.equal(actual.flatten(1), indices)
    labels = torch.full((6000,), 3)
    classes = generator.condition.no_class, 3
    none, cond = (
        generator(torch.zeros(1, 1, dtype=torch.long), torch.tensor([c]))[0, 0] for c in classes
    )
    for scale in (0, 0.5):
        samples = (
            torch.bincount(
                generate(generator, labels, (1, 1), cfg_scale=scale).flatten(), minlength=K
            )
            / 6000
        )
        torch.testing.assert_close(
            samples, (none + scale * (cond - none)).softmax(-1), rtol=0, atol=0.025
        )


@pytest.mark.parametrize("name", ("cfg_scale", "temperature", "top_k", "top_p", "seed"))
@pytest.mark.parametrize("value", (-1, float("nan"), float("inf"), "1", None, True, 10**30))
def test_settings_out_of_range_are_refused(name, value, generator):
    with pytest.raises(UserError, match=f"{name} is "):
        generate(generator, LABELS, (4, 4), **{name: value})


@pytest.mark.parametrize("interval", ((-1, 3), (float("nan"), 3), (0, 1, 2), "ab", 3))
def test_an_interval_is_two_places_of_tokens(interval, generator):
    with pytest.raises(UserError, match="cfg_interval is "):
        generate(generator, LABELS, (4, 4), cfg_scale=2, cfg_interval=interval)


def test_the_extremes_of_the_ranges_have_their_meaning(generator):
    """A temperature so low that logits divided by it overflow takes the arg-max; the largest scale
    guides, and the largest seed draws.
    """
    cold = generate(generator, LABELS, (4, 4), temperature=1e-40)
    assert torch.equal(cold, generate(generator, LABELS, (4, 4), temperature=0))
    assert torch.equal(generate(generator, LABELS, (4, 4), temperature=1e-19), cold)
    guided = generate(generator, LABELS, (4, 4), cfg_scale=1e6, temperature=1e-19)
    assert torch.equal(guided, greedy(generator, LABELS, 4, 1e6))
    assert generate(
        generator, LABELS, (4, 4), temperature=1e6, seed=2**63 - 1
    ).unique().tolist() == list(range(K))


def test_scale_one_ignores_the_null_class(generator):
    before = generate(generator, LABELS, (4, 4), seed=1)
    generator.class_embedding.weight.data[generator.condition.no_class] = torch.nan
    assert torch.equal(generate(generator, LABELS, (4, 4), seed=1), before)


def test_the_same_seed_gives_the_same_sample(generator):
    one, two, other = (generate(generator, LABELS, (4, 4), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    torch.manual_seed(5)  # the global state does not matter, and does not change
    state = torch.get_rng_state()
    assert torch.equal(generate(generator, LABELS, (4, 4), seed=1), one) and torch.equal(
        torch.get_rng_state(), state
    )


def test_a_draw_is_that_of_multinomial():
    """The draws are equal bit for bit, as is the state of the random numbers afterwards, also where
    probabilities are zero.
    """
    logits = 4 * torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    p = filter_logits(logits, top_k=30).softmax(-1)
    one, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for _ in range(20):
        assert torch.equal(
            sampling._draw(logits, 1.0, 30, 1.0, one),
            torch.multinomial(p, 1, generator=other)[:, 0],
        )
    assert torch.equal(one.get_state(), other.get_state())


def test_compiled_blocks_sample_what_others_do_and_compile_nothing():
    """With a cache the blocks would be compiled again for the length of each token."""
    plain, compiled = tiny_generator(), tiny_generator()
    for block in compiled.blocks:
        block.compile()
    torch._dynamo.utils.counters.clear()
    samples = generate(compiled, LABELS, (4, 4), cfg_scale=2.0, seed=1)
    assert torch.equal(samples, generate(plain, LABELS, (4, 4), cfg_scale=2.0, seed=1))
    assert not torch._dynamo.utils.counters["frames"] and not torch._dynamo.utils.counters["stats"]


def test_the_dtype_of_samples_is_the_generators_on_a_cpu_and_bfloat16_on_a_gpu(device):
    generator = tiny_generator().to(device)
    assert sampling_dtype(generator) == {"cpu": torch.float32, "cuda": torch.bfloat16}[device]
    seen = []
    generator.blocks.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].dtype)
    )
    generate(generator, LABELS, (2, 2))
    assert set(seen) == {sampling_dtype(generator)}
    assert sampling_dtype(tiny_generator().bfloat16()) == torch.bfloat16


def test_top_one_is_temperature_zero(generator):
    expected = generate(generator, LABELS, (4, 4), temperature=0)
    assert torch.equal(
        generate(generator, LABELS, (4, 4), temperature=2.0, top_k=1, seed=3), expected
    )
    assert torch.equal(
        generate(generator, LABELS, (4, 4), temperature=2.0, top_p=0.0, seed=3), expected
    )


def test_samples_follow_the_guided_logits_over_the_temperature(generator):
    """The frequencies of 6,000 one-token samples are close to softmax((none + s (cond - none)) /
    T).
    """
    labels = torch.full((6000,), 3)
    classes = generator.condition.no_class, 3
    none, cond = (
        generator(torch.zeros(1, 1, dtype=torch.long), torch.tensor([c]))[0, 0] for c in classes
    )
    expected = ((none + 2 * (cond - none)) / 0.7).softmax(-1)
    samples = generate(generator, labels, (1, 1), cfg_scale=2.0, temperature=0.7)
    actual = torch.bincount(samples.flatten(), minlength=K) / 6000
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.025)
    assert (
        expected - cond.softmax(-1)
    ).abs().max() > 0.06  # so samples without guidance, or without temperature, would not fit


def kept_tokens(p, **limits):
    return (
        torch.isfinite(filter_logits(torch.tensor([p]).log(), **limits))[0]
        .nonzero()
        .flatten()
        .tolist()
    )


def test_top_p_keeps_the_first_token_that_crosses():
    p = [0.2, 0.5, 0.05, 0.25]
    assert [kept_tokens(p, top_p=t) for t in (0.01, 0.45, 0.55, 0.74, 0.76, 0.96)] == [
        [1],
        [1],
        [1, 3],
        [1, 3],
        [0, 1, 3],
        [0, 1, 2, 3],
    ]


def test_top_k_keeps_ties():
    p = [0.2, 0.3, 0.2, 0.2, 0.1]
    assert [kept_tokens(p, top_k=k) for k in (1, 2, 4, 5, 99)] == [
        [1],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4],
    ]


def test_the_nucleus_is_that_of_the_top_k():
    """The probabilities of the top two tokens are renormalised to .57 and .43, so the first alone
    fills a nucleus of one half.
    """
    p = [0.4, 0.3, 0.2, 0.1]
    assert kept_tokens(p, top_p=0.5) == [0, 1] and kept_tokens(p, top_k=2, top_p=0.5) == [0]


def test_no_limits_exclude_nothing():
    logits = torch.randn(3, K)
    assert torch.equal(filter_logits(logits), logits)


def test_rows_are_filtered_apart():
    logits = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]]).log()
    assert torch.isfinite(filter_logits(logits, top_p=0.5)).tolist() == [
        [True, False, False],
        [False, False, True],
    ]


@pytest.mark.parametrize("temperature", (0.0, 1.0))
@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_logits_that_are_no_numbers_draw_nothing(value, temperature):
    """The arg-max of NaN would be a valid index; here the class of a single row gives NaN."""
    generator = tiny_generator()
    generator.class_embedding.weight.data[3, 0] = value
    assert generate(generator, torch.tensor([0, 4]), (4, 4), temperature=temperature).shape == (
        2,
        4,
        4,
    )
    with pytest.raises(UserError, match="logits are not finite"):
        generate(generator, torch.tensor([0, 3]), (4, 4), temperature=temperature)
    with pytest.raises(UserError, match="logits are not finite"):
        sample(generator, tiny_tokenizer(codebook_size=K), [0, 3], (4, 4), temperature=temperature)


def test_a_sample_that_is_no_image_is_no_byte_either():
    tokenizer = tiny_tokenizer(codebook_size=K).eval()
    tokenizer.decoder.conv_out.bias.data[0] = math.nan
    with pytest.raises(UserError, match="decoded images hold values that are not finite"):
        sample(tiny_generator(), tokenizer, [0, 3], (4, 4))


def test_sample_renders_what_generate_draws():
    generator, tokenizer = tiny_generator(), tiny_tokenizer(codebook_size=K)
    images = sample(generator, tokenizer, [0, 3], (4, 4), seed=4, temperature=0.8)
    samples = generate(generator, torch.tensor([0, 3]), (4, 4), seed=4, temperature=0.8)
    with torch.no_grad():
        assert torch.equal(images, to_uint8(tokenizer.decode(samples)))
    assert images.shape == (2, 16, 16, 3) and images.dtype == torch.uint8


def test_dropout_acts_in_training_only():
    generator = tiny_generator(dropout=0.5)
    with torch.no_grad():
        assert torch.equal(generator(TOKENS, LABELS), generator(TOKENS, LABELS))
        generator.train()
        assert not torch.equal(generator(TOKENS, LABELS), generator(TOKENS, LABELS))
    assert replace(generator.config, dropout=0.0) == GENERATOR
