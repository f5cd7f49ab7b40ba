"""What only a CUDA device can show. Skipped without one: `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unigrpo_cli.algo import flow
from unigrpo_cli.algo.objective import Objective, unigrpo_loss
from unigrpo_cli.config import load_config
from unigrpo_cli.episode import Prompt, flatten
from unigrpo_cli.models.mot.checkpoint import load_model
from unigrpo_cli.models.policy import NoisyImage
from unigrpo_cli.replay import replay
from unigrpo_cli.rollout import Sampling, rollout
from unigrpo_cli.run.first_ratio import ratio_limits
from unigrpo_cli.train import score_old_and_reference, with_advantages
from unigrpo_cli.training.metrics import drift
from unigrpo_cli.training.optimizer import make_optimizer, prepare_policy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TINY = str(Path(__file__).parent / "golden" / "bagel_tiny")
PROMPTS = [Prompt("a", "a red cube"), Prompt("b", "two birds on a large blue sphere")]
SAMPLING = Sampling(True, 12, 1.0, 64, 48, 6, 3.0, "flow", 0.8, 8)


@pytest.fixture(autouse=True)
def _no_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@torch.no_grad()
def test_the_device_agrees_with_the_host_in_fp32() -> None:
    """Logits and velocities of the same weights, to 1e-4."""
    here, there = load_model(TINY), load_model(TINY, device="cuda")
    ids = here.given("prompt", "a red cube").ids[None]
    x = torch.randn(1, 2, 6, 64, generator=torch.Generator().manual_seed(0))
    image, t = x, torch.tensor([[0.9, 0.3]])
    outs = []
    for model in (here, there):
        noisy = NoisyImage(image.to(model.device), t.to(model.device), (2, 3))
        out = model.forward(model.empty_context(1), ids.to(model.device), image=noisy)
        outs.append((model.network.logits(out.hidden_BLC).cpu(), out.velocity_BKND.cpu()))
    for a, b in zip(*outs, strict=True):
        assert (a - b).abs().max() < 1e-4


@pytest.mark.parametrize("finetune", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_the_first_ratio_is_one_within_rounding(finetune: str, dtype: str, checkpointing: str) -> None:
    """Attention may run another kernel with gradients than without; both experts get finite gradients."""
    config = load_config(
        overrides=[
            f"train.finetune={finetune}",
            f"dtype={dtype}",
            f"train.activation_checkpointing={checkpointing}",
            "train.minibatches=1",
            "train.micro_batch_size=3",
        ]
    )
    policy = load_model(TINY, device="cuda", dtype=getattr(torch, dtype))
    policy.network.requires_grad_(False)
    policy = prepare_policy(policy, config)
    optimizer = make_optimizer(policy, config)
    episodes = flatten(rollout(policy, PROMPTS, 3, SAMPLING, flow.Window(1, 3), seed=0))
    objective = Objective(1.0, 1.0, 0.2, 1e-3, 0.0, "ratio-norm", "velocity-mse", 0.01)
    limits = ratio_limits(policy, config.objective)
    (share,) = with_advantages(
        score_old_and_reference(policy, episodes, config, objective), torch.linspace(-1, 1, 6)[:, None].expand(-1, 2)
    )
    for m in share:
        new = replay(policy, m.batch)
        loss = unigrpo_loss(m.batch.actions, new, m.old, m.reference, m.advantages, objective, episodes=6)
        loss.total.backward()
        for kind, limit in limits.items():
            assert loss.maxima[f"{kind}/max_abs_log_ratio"].item() <= limit
    for parameters in policy.trainable().values():
        norms = torch.stack([p.grad.norm() for p in parameters if p.grad is not None])
        assert norms.isfinite().all()
        assert norms.max() > 0
    optimizer.step()
    limit = {"float32": 1e-4, "bfloat16": config.train.drift_limit}[dtype]  # beyond it a run warns
    assert drift([(m.batch, m.old) for m in share])["text/drift_mean"] < limit


def test_the_reference_streamed_from_the_host_is_the_one_on_the_device() -> None:
    """Bit for bit, and the layers' weights are in host memory between passes."""
    policies = []
    for where in ("device", "host"):
        config = load_config(overrides=["train.finetune=full", "dtype=bfloat16", f"train.reference_device={where}"])
        policy = load_model(TINY, device="cuda", dtype=torch.bfloat16)
        policy.network.requires_grad_(False)
        policies.append(prepare_policy(policy, config))
    ids = policies[0].given("prompt", "a red cube").ids[None].cuda()
    with torch.no_grad(), policies[0].reference() as a, policies[1].reference() as b:
        assert torch.equal(*(m.forward(m.empty_context(1), ids).hidden_BLC for m in (a, b)))
    layer = policies[1].frozen.language_model.model.layers[0]
    assert layer.mlp.up_proj.weight.device.type == "cpu"
