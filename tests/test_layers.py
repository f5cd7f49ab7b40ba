"""Layers whose arithmetic a CPU does in its own way are the plain ones in all but speed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unigrpo_cli.models.mot import layers
from unigrpo_cli.models.mot.layers import Linear, RMSNorm, gated, linear, position_waves, rotate, rotation, time_waves

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
of_onednn = pytest.mark.skipif(not ONEDNN, reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def _by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "onednn_is_faster", lambda: ONEDNN)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@of_onednn
@pytest.mark.parametrize("shape", [(1, 5), (7, 5), (2, 3, 5), (2, 1, 4, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_linear(shape: tuple[int, ...], bias: bool) -> None:
    """Against fp64: sums of five products of numbers around 1, so a few fp32 roundings."""
    x, w, b = _random(*shape), _random(11, 5, seed=1), _random(11, seed=2) if bias else None
    given = [t for t in (x, w, b) if t is not None]
    upstream = _random(*shape[:-1], 11, seed=3).detach()
    found = linear(x, w, b)
    assert "OneDNN" in type(found.grad_fn).__name__
    wide = [t.detach().double().requires_grad_() for t in given]
    expected = F.linear(*wide)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6)
    gradients = torch.autograd.grad(found, given, upstream)
    for own, other in zip(gradients, torch.autograd.grad(expected, wide, upstream.double()), strict=True):
        torch.testing.assert_close(own.double(), other, rtol=0, atol=1e-5)


@of_onednn
@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_holds_no_memory(frozen: str) -> None:
    tensors = {"x": _random(7, 5), "weight": _random(11, 5, seed=1), "bias": _random(11, seed=2)}
    tensors[frozen].requires_grad_(False)
    out = linear(**tensors)
    kept = [t for t in out.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    assert len(kept) == {"x": 1, "weight": 1, "bias": 2}[frozen]
    out.sum().backward()
    assert [name for name, t in tensors.items() if t.grad is None] == [frozen]


@of_onednn
def test_views_transposed_and_strided_inputs() -> None:
    x, w = _random(2, 5, 3), _random(11, 10, seed=1)
    rotated, sliced = x.transpose(1, 2), w[:, ::2]
    torch.testing.assert_close(linear(rotated, sliced, None), F.linear(rotated, sliced), rtol=0, atol=3e-6)


@of_onednn
def test_rows_do_not_depend_on_how_many_come_together() -> None:
    """So that decoding and replay agree: from two rows on to the bit, alone to rounding.

    The oneDNN of torch before 2.14 chooses kernels by the number of rows: there all agree to rounding.
    """
    exact = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)
    layer, x = Linear(128, 344), _random(300, 128).detach()
    with torch.no_grad():
        together = layer(x)
        for rows in (2, 3, 17, 150):
            torch.testing.assert_close(layer(x[:rows]), together[:rows], rtol=0, atol=0 if exact else 1e-5)
        torch.testing.assert_close(layer(x[:1]), together[:1], rtol=0, atol=1e-5)


@of_onednn
def test_nothing_to_multiply() -> None:
    assert linear(torch.zeros(2, 0, 5), _random(11, 5), None).shape == (2, 0, 11)


@of_onednn
def test_other_dtypes_go_the_common_way() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        assert "OneDNN" not in type(linear(_random(7, 5).to(dtype), _random(11, 5).to(dtype), None).grad_fn).__name__


def _rotated_by_complex_numbers(x_BLHE: Tensor, position_BL: Tensor, theta: float) -> Tensor:
    """The textbook's rotation: a + i b times exp(i angle)."""
    half = x_BLHE.shape[-1] // 2
    angle = position_BL[:, :, None, None].float() * theta ** -(torch.arange(half) / half)
    rotated = torch.complex(x_BLHE[..., :half], x_BLHE[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([rotated.real, rotated.imag], dim=-1)


@pytest.mark.parametrize("frozen", ["", "x", "weight"])
@pytest.mark.parametrize("shared", [True, False, None])
def test_norm_and_rotation_with_their_gradients(shared: bool | None, frozen: str) -> None:
    """Against torch's own norm and complex numbers, in fp64; one position for all tokens, one for each, or none."""
    x = _random(3, 5, 2, 8).detach().double().requires_grad_()
    norm = RMSNorm(8, 1e-3).double()
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    x.requires_grad_(frozen != "x")
    norm.weight.requires_grad_(frozen != "weight")
    upstream = _random(3, 5, 2, 8, seed=2).detach().double()
    position = torch.tensor([[4], [0], [7]]) + (torch.arange(5) if not shared else torch.zeros(1, dtype=torch.long))
    expected = F.rms_norm(x, (8,), norm.weight, 1e-3)
    rotated = None
    if shared is not None:
        rotated = rotation(position, 8, 100.0)
        expected = _rotated_by_complex_numbers(expected, position, 100.0)
    found = norm(x, rotated)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if rotated else 1e-13)  # fp32 angles
    if rotated is not None:
        expected = rotate(F.rms_norm(x, (8,), norm.weight, 1e-3), rotated)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    given = [t for name, t in (("x", x), ("weight", norm.weight)) if name != frozen]
    gradients = torch.autograd.grad(found, given, upstream)
    for own, other in zip(gradients, torch.autograd.grad(expected, given, upstream), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)


def test_a_gate_and_its_gradients() -> None:
    gate, up = _random(4, 6), _random(4, 6, seed=1)
    wide = [t.detach().double().requires_grad_() for t in (gate, up)]
    found, expected = gated(gate, up), F.silu(wide[0]) * wide[1]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    upstream = _random(4, 6, seed=2).detach()
    gradients = torch.autograd.grad(found, (gate, up), upstream)
    for own, other in zip(gradients, torch.autograd.grad(expected, wide, upstream.double()), strict=True):
        torch.testing.assert_close(own.double(), other, rtol=0, atol=1e-6)


def test_gradients_change_no_bit() -> None:
    """Old scores are made without, new ones with: their ratio is 1 only if both are the same numbers."""
    norm, rotated = RMSNorm(32, 1e-6), rotation(torch.arange(14).view(2, 7), 32, 1e4)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    x, up, w = _random(2, 7, 3, 32), _random(2, 7, 3, 32, seed=1), _random(11, 32, seed=2)
    for layer in (norm, lambda x: norm(x, rotated), lambda x: gated(x.clone(), up), lambda x: linear(x, w, None)):
        with torch.no_grad():
            without = layer(x)
        assert layer(x).requires_grad and torch.equal(layer(x), without)


def test_waves_are_diffusers_own() -> None:
    """To the bit, for times of both schedules and for the sizes of the toy model and of BAGEL."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding

    t_R = torch.cat([torch.linspace(0, 1, 33), torch.rand(8, generator=torch.Generator().manual_seed(0)) * 1000])
    theirs = get_timestep_embedding(t_R, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(time_waves(t_R, 256), theirs)
    for side, width in ((6, 128), (64, 3584)):
        theirs = get_2d_sincos_pos_embed(width, side, base_size=side, output_type="pt")
        assert torch.equal(position_waves(side, width).float(), theirs.float())


def test_a_command_without_adapters_imports_no_library_that_it_does_not_use() -> None:
    """peft, diffusers and sharded tensors take five of eight seconds of a start; torch takes most of the rest."""
    code = (
        "import sys\n"
        "from unigrpo_cli.cli.common import _announced_torch\n"
        "with _announced_torch(quiet=False):\n"
        "    import unigrpo_cli.run.trainer, unigrpo_cli.models.mot.policy, unigrpo_cli.parallel.join\n"
        "print({'peft', 'diffusers', 'torch.distributed.tensor'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "loading torch ...\n")
