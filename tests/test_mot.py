"""The network: one operation for sampling and training, who sees whom, who belongs to which expert."""

from __future__ import annotations

import pytest
import torch

from unigrpo_cli.models.mot.config import expert_of
from unigrpo_cli.models.mot.policy import MoTPolicy
from unigrpo_cli.models.policy import NoisyImage

GRID = (6, 6)


def _ids(rows: int, length: int, model: MoTPolicy) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(5, model.tokenizer.get_vocab_size(), (rows, length), generator=generator)


def _image(rows: int, copies: int, model: MoTPolicy, seed: int = 4) -> NoisyImage:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, copies, 36, model.token_dim, generator=generator, dtype=torch.float64)
    t = torch.linspace(1.0, 0.3, copies, dtype=torch.float64).expand(rows, copies)
    return NoisyImage(x, t, GRID)


def test_packed_copies_equal_separate_passes_in_value_and_gradient(tiny: MoTPolicy) -> None:
    """K noisy copies in one pass, or K passes that each read the context again: the same, to 1e-12."""
    ids, image = _ids(2, 9, tiny), _image(2, 3, tiny)
    weight = torch.randn(image.x_BKND.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def gradients() -> dict[str, torch.Tensor]:
        found = {n: p.grad.clone() for n, p in tiny.network.named_parameters() if p.grad is not None}
        tiny.network.zero_grad()
        return found

    packed = tiny.forward(tiny.empty_context(2), ids, image=image).velocity_BKND
    (packed * weight).sum().backward()
    together = gradients()
    for k in range(3):
        one = NoisyImage(image.x_BKND[:, k : k + 1], image.t_BK[:, k : k + 1], GRID)
        single = tiny.forward(tiny.empty_context(2), ids, image=one).velocity_BKND
        torch.testing.assert_close(single[:, 0], packed[:, k], rtol=1e-10, atol=1e-12)
        (single[:, 0] * weight[:, k]).sum().backward()
    separate = gradients()
    assert together.keys() == separate.keys()
    for name in together:
        torch.testing.assert_close(together[name], separate[name], rtol=1e-9, atol=1e-11, msg=name)


@torch.no_grad()
def test_reading_piece_by_piece_equals_reading_at_once(tiny: MoTPolicy) -> None:
    """With a cache that is full, has room, or is made of pieces; then an image looks at it."""
    ids, image = _ids(3, 12, tiny), _image(3, 2, tiny)
    whole = tiny.forward(tiny.empty_context(3), ids, image=image)
    for capacity in (0, 5, 12, 40):
        context, hidden = tiny.empty_context(3).reserve(capacity), []
        for piece in ids.split([4, 1, 1, 5, 1], dim=1):
            out = tiny.forward(context, piece)
            context = out.context
            hidden.append(out.hidden_BLC)
        torch.testing.assert_close(torch.cat(hidden, dim=1), whole.hidden_BLC, rtol=1e-9, atol=1e-11)
        v = tiny.forward(context, image=image).velocity_BKND
        torch.testing.assert_close(v, whole.velocity_BKND, rtol=1e-9, atol=1e-11)


def test_spare_capacity_changes_nothing_under_gradients(tiny: MoTPolicy) -> None:
    """Two texts read into one reserved context: neither overwrites what the other's backward pass needs."""
    ids, grads = _ids(2, 8, tiny), []
    for spare in (0, 20):
        tiny.network.zero_grad()
        context = tiny.forward(tiny.empty_context(2).reserve(spare), ids[:, :4]).context
        first = tiny.forward(context, ids[:, 4:6]).hidden_BLC
        second = tiny.forward(context, ids[:, 6:]).hidden_BLC
        (first.square().sum() + 2 * second.square().sum()).backward()
        grads.append({n: p.grad.clone() for n, p in tiny.network.named_parameters() if p.grad is not None})
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient, rtol=1e-10, atol=1e-12, msg=name)


@torch.no_grad()
def test_rows_of_unequal_length_are_independent(tiny: MoTPolicy) -> None:
    """Each row as if alone; whatever ids stand in the padding."""
    lengths = [9, 4, 6]
    ids, image = _ids(3, 9, tiny), _image(3, 2, tiny)
    for pad in (0, 7):
        padded = ids.clone()
        for row, n in enumerate(lengths):
            padded[row, n:] = pad
        out = tiny.forward(tiny.empty_context(3), padded, lengths, image)
        more = tiny.forward(out.context, ids[:, :2], image=image)
        for row, n in enumerate(lengths):
            own = NoisyImage(image.x_BKND[row : row + 1], image.t_BK[row : row + 1], GRID)
            alone = tiny.forward(tiny.empty_context(1), ids[row : row + 1, :n], image=own)
            torch.testing.assert_close(out.hidden_BLC[row, :n], alone.hidden_BLC[0], rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(out.velocity_BKND[row], alone.velocity_BKND[0], rtol=1e-9, atol=1e-11)
            after = tiny.forward(alone.context, ids[row : row + 1, :2], image=own)
            torch.testing.assert_close(more.hidden_BLC[row], after.hidden_BLC[0], rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(more.velocity_BKND[row], after.velocity_BKND[0], rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_text_is_causal_and_never_sees_a_noisy_image(tiny: MoTPolicy) -> None:
    ids, image = _ids(1, 8, tiny), _image(1, 1, tiny)
    with_image = tiny.forward(tiny.empty_context(1), ids, image=image).hidden_BLC
    without = tiny.forward(tiny.empty_context(1), ids).hidden_BLC
    assert torch.equal(with_image, without)
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 50
    other = tiny.forward(tiny.empty_context(1), changed).hidden_BLC
    torch.testing.assert_close(other[:, :5], without[:, :5], rtol=1e-12, atol=1e-14)
    assert (other[:, 5:] - without[:, 5:]).abs().amin(dim=-1).max() > 0


@torch.no_grad()
def test_an_image_sees_all_of_itself_and_all_text(tiny: MoTPolicy) -> None:
    ids, image = _ids(1, 8, tiny), _image(1, 1, tiny)
    base = tiny.forward(tiny.empty_context(1), ids, image=image).velocity_BKND
    for first in (0, 7):
        changed = ids.clone()
        changed[0, first] = 5 if changed[0, first] != 5 else 6
        assert (tiny.forward(tiny.empty_context(1), changed, image=image).velocity_BKND != base).all()
    x = image.x_BKND.clone()
    x[0, 0, 35] += 1
    moved = tiny.forward(tiny.empty_context(1), ids, image=NoisyImage(x, image.t_BK, GRID)).velocity_BKND
    assert (moved[0, 0, 0] != base[0, 0, 0]).all()


@torch.no_grad()
def test_a_clean_image_joins_the_context_and_moves_it_by_one_position(tiny: MoTPolicy) -> None:
    ids, image = _ids(2, 6, tiny), _image(2, 1, tiny)
    before = tiny.forward(tiny.empty_context(2), ids).context
    after = tiny.encode_image(before, image.x_BKND[:, 0], GRID)
    assert after.used == before.used + 36 + 2
    assert (after.position_B == before.position_B + 1).all()
    seen, unseen = (tiny.forward(c, ids[:, :3]).hidden_BLC for c in (after, before))
    assert (seen - unseen).abs().max() > 1e-3


def test_detached_context_keeps_the_image_loss_from_the_text(tiny: MoTPolicy) -> None:
    """Full: the image teaches the text expert. Detach: neither through the context nor the boundary tokens."""
    for detach in (False, True):
        tiny.network.zero_grad()
        out = tiny.forward(tiny.empty_context(2), _ids(2, 6, tiny), image=_image(2, 2, tiny), detach_context=detach)
        out.velocity_BKND.square().sum().backward()
        grads = {n: p.grad for n, p in tiny.network.named_parameters()}
        assert grads["language_model.model.layers.1.self_attn.q_proj_moe_gen.weight"].abs().max() > 0
        taught = {n for n, g in grads.items() if expert_of(n) == "text" and g is not None and g.abs().max() > 0}
        if detach:
            assert not taught
        else:
            assert "language_model.model.layers.0.mlp.down_proj.weight" in taught
            assert "language_model.model.embed_tokens.weight" in taught


def test_every_parameter_belongs_to_one_expert(tiny: MoTPolicy) -> None:
    names = [n for n, _ in tiny.network.named_parameters()]
    image = {n for n in names if expert_of(n) == "image"}
    assert "language_model.model.layers.0.mlp_moe_gen.up_proj.weight" in image
    assert {"vae2llm.weight", "llm2vae.bias", "time_embedder.mlp.0.weight"} <= image
    text = set(names) - image
    assert {"language_model.lm_head.weight", "language_model.model.layers.0.mlp.up_proj.weight"} <= text
    groups = tiny.trainable()
    trained = [p for p in tiny.network.parameters() if p.requires_grad]
    assert len(groups["text"]) + len(groups["image"]) == len(trained)


def test_text_loss_leaves_the_image_expert_alone(tiny: MoTPolicy) -> None:
    out = tiny.forward(tiny.empty_context(2), _ids(2, 6, tiny), image=_image(2, 1, tiny))
    tiny.logits(out.hidden_BLC).square().sum().backward()
    for name, parameter in tiny.network.named_parameters():
        touched = parameter.grad is not None and parameter.grad.abs().max() > 0
        if parameter.requires_grad:
            assert touched == (expert_of(name) == "text"), name


def test_activation_checkpointing_changes_no_gradient(tiny: MoTPolicy) -> None:
    grads = []
    for switch in (False, True):
        tiny.network.activation_checkpointing = switch
        tiny.network.zero_grad()
        out = tiny.forward(tiny.empty_context(2), _ids(2, 6, tiny), [6, 4], _image(2, 2, tiny))
        (out.velocity_BKND.square().sum() + out.hidden_BLC.square().sum()).backward()
        grads.append({n: p.grad.clone() for n, p in tiny.network.named_parameters() if p.grad is not None})
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("height", "width"), [(20, 48), (48, 56), (0, 48), (-8, 8)])
def test_sizes_that_do_not_fit(tiny: MoTPolicy, height: int, width: int) -> None:
    with pytest.raises(ValueError, match="multiples of 8, at most 48"):
        tiny.grid(height, width)


def test_pixels_survive_the_round_trip(tiny: MoTPolicy) -> None:
    pixels = torch.randint(0, 256, (2, 32, 48, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(tiny.decode_pixels(tiny.encode_pixels(pixels), (4, 6)), pixels)


def test_ids_beyond_the_tokenizer_are_impossible(tiny: MoTPolicy) -> None:
    words = tiny.tokenizer.get_vocab_size()
    head = torch.nn.Linear(32, words + 9, bias=False, dtype=torch.float64)
    tiny.network.language_model.lm_head = head
    logits = tiny.logits(torch.randn(2, 32, dtype=torch.float64))
    assert (logits[:, words:] == -torch.inf).all()
    assert torch.isfinite(logits[:, :words]).all()
