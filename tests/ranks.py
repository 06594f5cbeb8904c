"""What the tests of expert parallelism run on every rank: cases, and what a rank finds in each of them.

It is imported by processes that are forked from a server, and without pytest.
"""

import inspect
import os
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, DeepseekV2ForCausalLM, DeepseekV2MoE, MoEGate, ops
from dsv2_ref import balance as balance_module
from dsv2_ref import parallel as parallel_module
from dsv2_ref.capacity import TokenDropping
from dsv2_ref.loss_free import LossFreeBalancing
from dsv2_ref.optimizer_state import OptimizerState
from dsv2_ref.parallel import ParallelExperts, average_gradients, parallelize_experts, share_experts
from dsv2_ref.recompute import checkpointed
from experiments import parallel as experiment
from experiments.corpus import KINDS

SIZES = DeepseekV2Config(
    vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=12, num_hidden_layers=3,
    num_attention_heads=2, q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=6,
    n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4, max_position_embeddings=64, aux_loss_alpha=0.0,
    initializer_range=0.3,
)  # fmt: skip
GROUPED = replace(SIZES, topk_method="group_limited_greedy", n_group=8, topk_group=3, routed_scaling_factor=2.0)
V3 = replace(GROUPED, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True)
LOSSES = {"aux_loss_alpha": 0.3, "device_aux_loss_alpha": 0.5, "communication_aux_loss_alpha": 0.2}
SEQ = 5


@dataclass(frozen=True)
class Case:
    """A module, the batches that the ranks bring, and what is on while it is trained."""

    config: DeepseekV2Config
    kind: type[nn.Module] = DeepseekV2MoE
    dtype: torch.dtype = torch.float64
    liked: tuple[int, ...] = ()  # experts that all tokens choose
    shunned: tuple[int, ...] = ()  # and that none chooses
    checkpointing: str = ""
    dropping: bool = False
    loss_free: bool = False
    plain: bool = False

    def build(self) -> nn.Module:
        """The same weights on every rank, and in one process."""
        torch.manual_seed(1)
        layer = (1,) if self.kind is DeepseekV2DecoderLayer else ()
        module = self.kind(self.config, *layer).to(self.dtype).train()
        for gate in module.modules():
            if isinstance(gate, MoEGate):
                with torch.no_grad():
                    gate.weight[:, 0] = 0.0
                    gate.weight[list(self.liked), 0] = 20.0
                    gate.weight[list(self.shunned), 0] = -20.0
        return module

    def batch(self, ranks: int) -> list[Tensor]:
        """What each rank brings: one or two sequences, or none, of tokens for a model, of hidden states for others."""
        generator = torch.Generator().manual_seed(2)
        numbers = [(1 + rank) % 3 for rank in range(ranks)]
        if self.kind is DeepseekV2ForCausalLM:
            return [torch.randint(self.config.vocab_size, (n, SEQ), generator=generator) for n in numbers]
        whole = [
            torch.randn(n, SEQ, self.config.hidden_size, dtype=torch.float64, generator=generator) for n in numbers
        ]
        for x in whole:
            x[..., 0] = 1.0  # by which experts are liked
        return [x.to(self.dtype) for x in whole]


CASES = {
    "greedy": Case(SIZES),
    "definitions alone": Case(SIZES, plain=True),
    "groups, and losses for each sequence": Case(replace(GROUPED, **LOSSES)),
    "groups, and losses over all tokens": Case(replace(GROUPED, **LOSSES, seq_aux=False)),
    "all tokens to one rank": Case(replace(SIZES, num_experts_per_tok=2), liked=(4, 5)),
    "a rank that receives nothing": Case(SIZES, shunned=(0, 1)),
    "a layer": Case(replace(GROUPED, **LOSSES, seq_aux=False), DeepseekV2DecoderLayer),
    "a layer computed twice": Case(GROUPED, DeepseekV2DecoderLayer, checkpointing="full", dropping=True),
    "a layer of which some is computed twice": Case(
        GROUPED, DeepseekV2DecoderLayer, checkpointing="selective", dropping=True
    ),
    "dropping": Case(GROUPED, dropping=True),
    "a model": Case(replace(GROUPED, **LOSSES, seq_aux=False), DeepseekV2ForCausalLM),
    "a model of V3's gate": Case(V3, DeepseekV2ForCausalLM, loss_free=True),
    "bfloat16": Case(GROUPED, dtype=torch.bfloat16),
}


def train(case: Case, batches: list[Tensor], module: nn.Module, whole: list[Tensor] | None = None) -> dict[str, Any]:
    """A training step on these batches, by the mean over ranks of the ranks' losses; ``whole`` is what all bring."""
    whole = batches if whole is None else whole
    dropping = TokenDropping(module, 0.8, 0.3, torch.Generator().manual_seed(7)) if case.dropping else None
    balancing = LossFreeBalancing(module, 0.01) if case.loss_free else None
    x = torch.cat(batches)
    if x.is_floating_point():
        x.requires_grad_()
    with ops.plain() if case.plain else nullcontext():
        out = checkpointed(module, case.checkpointing)(x) if case.checkpointing else module(x)
        out = out[0] if isinstance(out, tuple) else out
        weights = torch.linspace(-1, 1, out.shape[1:].numel(), dtype=torch.float64).view(out.shape[1:])
        loss = (out * weights.to(out.dtype)).sum()
        # A step of one process sees all batches, of which each rank's loss has a part of one in so many.
        (loss / (len(whole) if batches is whole else 1)).backward()
    if balancing is not None:
        balancing.step()
    if dropping is not None:
        dropping.step()
        dropping.remove()
    return {"out": out.detach(), "x": x.grad, "gates": [g.detach() for g in _biases(module)]}


def _biases(module: nn.Module) -> list[Tensor]:
    biases = [getattr(part, "e_score_correction_bias", None) for part in module.modules()]
    return [bias for bias in biases if bias is not None]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """By published names."""
    found = {name: weight.grad for name, weight in module.named_parameters() if not name.endswith(STACKS)}
    for path, part in module.named_modules():
        if hasattr(part, "published"):
            stacks = {name: getattr(part, name) for name in ("gate_up_proj", "down_proj")}
            for name, weight in stacks.items():
                for expert, one in enumerate(weight.grad):
                    found[f"{path}.{part.first + expert}.{name}"] = one
    return found


STACKS = ("experts.gate_up_proj", "experts.down_proj")


class Sent(TorchDispatchMode):
    """Bytes of every all-to-all that this rank sends to each rank, itself included, in forward and backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.to: list[list[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_to_all_single" in str(func):
            rows, _, sent = args[:3]
            self.to.append([n * rows[:1].numel() * rows.element_size() if len(rows) else 0 for n in sent])
        return func(*args, **(kwargs or {}))


def all_cases(names: list[str]) -> dict[str, Any]:
    """What this rank finds in each case."""
    found = {}
    for name in names:
        case, rank, ranks = CASES[name], dist.get_rank(), dist.get_world_size()
        module, batches = parallelize_experts(case.build()), case.batch(ranks)
        with Sent() as sent:
            told = train(case, [batches[rank]], module, batches)
        told["norm"], told["gradients"] = parallel_module.average_gradients(module), gradients(module)
        told["sent"], told["state"] = sent.to, list(module.state_dict())
        found[name] = told
    return found


# Faults that the comparison must find

FAULTS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "rows return in sorted order": (ParallelExperts.forward, "(0, row, made", "(0, row.sort()[0], made"),
    "weights in the order of the ranks": (ParallelExperts.forward, "weight[order, None]", "weight[:, None]"),
    "experts by their numbers among all": (ParallelExperts.forward, "expert % here", "expert"),
    "counts from the wrong side": (ParallelExperts.forward, "arriving.T.tolist()", "counts.T.tolist()"),
    "gradients of experts not divided": (average_gradients, "/ ranks.total)", "/ (1 if mine else ranks.total))"),
    "pooled losses of each rank alone": (balance_module._over, "ranks is None", "True"),
    "losses of sequences by each rank's own number": (balance_module._mean, "ranks is None or not seq_aux", "True"),
    "every rank drops for itself": (TokenDropping._drop, 'getattr(gate, "ranks", None)', "None"),
}
OVERFULL = ("experts by their numbers among all", "counts from the wrong side")
"""Faults that end in an error."""


def with_fault(fault: str, name: str) -> dict[str, Any]:
    """`all_cases` of one case, where a function has one piece of its source replaced."""
    function, before, after = FAULTS[fault]
    home = inspect.getmodule(inspect.unwrap(function))
    path = function.__qualname__.split(".")
    owner: Any = home if len(path) == 1 else getattr(home, path[0])
    lines = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    assert lines.count(before) == 1, before
    lines = lines.replace(before, after).replace("super()", "super(ParallelExperts, self)")
    names = vars(home) | {"ParallelExperts": ParallelExperts}
    exec(lines[lines.index("def ") :], names)
    setattr(owner, path[-1], names[path[-1]])
    return all_cases([name])


def texts() -> dict[str, Tensor]:
    """A small stand-in for the corpus."""
    generator = torch.Generator().manual_seed(0)
    return {kind: torch.randint(256, (4_000,), generator=generator) for kind in KINDS}


def curves(run: str, groups: int, dropping: bool) -> dict[str, list[float]]:
    """Three steps of `experiments.parallel`."""
    return experiment.train(run, 3, groups, dropping, "cpu", texts())


def doomed(rank: int, folder: Path, fate: str, timeout: str) -> None:
    """`experiments.parallel` as torchrun starts it, on a rank of 4; rank 1 never comes, or dies or hangs at its second
    step."""
    if rank == 1 and fate == "never comes":
        os._exit(3)
    sys.stderr = (folder / f"{rank}.txt").open("w")
    store = f"file://{folder}/meet"
    meet = dist.init_process_group
    dist.init_process_group = lambda backend, **how: meet(backend, store, rank=rank, world_size=4, **how)
    os.environ |= {f"{where}RANK": str(rank) for where in ("", "LOCAL_")}
    os.environ |= {f"{where}WORLD_SIZE": "4" for where in ("", "LOCAL_")}
    experiment.corpus = texts  # type: ignore[assignment]
    step = experiment.Training.step

    def ill_fated(training: experiment.Training, number: int, tokens: Tensor) -> Tensor:
        if rank == 1 and number == 1:
            os._exit(3) if fate == "dies" else time.sleep(600)
        return step(training, number, tokens)

    experiment.Training.step = ill_fated  # type: ignore[method-assign]
    experiment.main(["--steps", "5", "--timeout", timeout, "--groups", "2" if fate == "hangs" else "1"])


def refusals() -> dict[str, str]:
    """What each rank of four says of modules that cannot be shared; in the last cases of two groups of two."""
    rank, said = dist.get_rank(), {}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "experts"))
    pairs = mesh["experts"], mesh["replicas"]
    groups = {"experts of a set": pairs, "replicas": (pairs[0], pairs[0])}

    def moe(config: DeepseekV2Config = SIZES) -> DeepseekV2MoE:
        return DeepseekV2MoE(config)

    def moved(module: nn.Module, on: int, name: str) -> nn.Module:
        if rank == on:
            module.get_parameter(name).data.view(-1)[-1] += 1
        return module

    def recomputed() -> nn.Module:
        model = DeepseekV2ForCausalLM(SIZES)
        if rank == 2:
            model.gradient_checkpointing_enable()
        return model

    def biased() -> nn.Module:
        module = moe(V3)
        module.gate.e_score_correction_bias += float(rank == 0)
        return module

    wrong: dict[str, Callable[[], nn.Module]] = {
        "configuration": lambda: moe(replace(SIZES, num_experts_per_tok=3 if rank == 1 else 4)),
        "dtype": lambda: moe().double() if rank == 2 else moe(),
        "mode": recomputed,
        "experts": lambda: moe(replace(SIZES, n_routed_experts=17)),
        "groups": lambda: moe(replace(SIZES, topk_method="group_limited_greedy", n_group=2, topk_group=2)),
        "no experts": lambda: nn.Linear(1, 1),
        "seed": moe,
        "one element": lambda: moved(moe(), 3, "shared_experts.up_proj.weight"),
        "bias": biased,
        "share": lambda: share_experts(moe(), rank if rank < 3 else 0, 4),
        "replicas": moe,
        "experts of a set": lambda: moved(share_experts(moe(), rank % 2, 2), 3, "experts.down_proj"),
    }
    for name, module in wrong.items():
        torch.manual_seed(1 if name == "seed" and rank == 1 else 0)
        try:
            parallelize_experts(module(), *groups.get(name, ()))
        except ValueError as error:
            said[name] = str(error)
    return said


def counted(seed: int) -> list[dict[str, Any]]:
    """Random calls of the experts, forward, again where checkpointed, and backward: what went to each rank, and what was chosen."""
    rank, ranks, found = dist.get_rank(), dist.get_world_size(), []
    alike = torch.Generator().manual_seed(seed)
    own = torch.Generator().manual_seed(1000 * seed + rank)

    def draw(least: int, most: int, generator: torch.Generator = alike) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    for _ in range(12):
        experts, hidden = ranks * draw(1, 3), draw(1, 9)
        k, dtype = draw(1, min(experts, 6)), (torch.float64, torch.float32, torch.bfloat16)[draw(0, 2)]
        config = replace(SIZES, n_routed_experts=experts, num_experts_per_tok=k, hidden_size=2 * hidden)
        module = parallelize_experts(DeepseekV2MoE(config).to(dtype)).experts
        tokens = draw(0, 20, own)
        x = torch.randn(tokens, 2 * hidden, generator=own).to(dtype).requires_grad_()
        idx = torch.rand(tokens, experts, generator=own).topk(k).indices
        weight = torch.rand(tokens, k, generator=own).to(torch.promote_types(dtype, torch.float32))
        weight = weight * (torch.rand(tokens, k, generator=own) < 0.8)  # some are dropped
        mode = (None, "full", "selective")[draw(0, 2)]
        told: dict[str, Any] = {"config": config.to_dict(), "dtype": str(dtype).removeprefix("torch."), "mode": mode}
        with Sent() as forward:
            out = (checkpointed(module, mode) if mode else module)(x, idx, weight.requires_grad_())
        with Sent() as backward:
            out.sum().backward()
        told |= {"forward": forward.to, "backward": backward.to, "idx": idx, "weight": weight.detach()}
        found.append(told)
    return found


def some_without_gradients() -> dict[str, float | None]:
    """Means of gradients of 6, of which a rank lacks one; both lack another."""
    module = parallelize_experts(DeepseekV2MoE(SIZES))
    for number, weight in enumerate(module.parameters()):
        if number % 3 < 2 and not (number % 3 == 0 and dist.get_rank() == 1):
            weight.grad = torch.full_like(weight, 6.0)
    average_gradients(module)
    return {
        name: None if weight.grad is None else float(weight.grad.mean()) for name, weight in module.named_parameters()
    }


IDS = torch.tensor([[1, 2, 3, 4, 5]])


def read_and_run(folder: str) -> tuple[Tensor, str]:
    """A model of which this rank has read its experts; and what is said where it has read another's."""
    rank, read = dist.get_rank(), DeepseekV2ForCausalLM.from_pretrained
    model = parallelize_experts(read(folder, experts_of=(rank, 2)))
    with torch.no_grad():
        out = model(IDS)[0]
    try:
        parallelize_experts(read(folder, experts_of=(1 - rank, 2)))
    except ValueError as error:
        return out, str(error)
    return out, ""


def saved(folder: str) -> tuple[str, list[Tensor]]:
    """What is said where one rank saves its share alone; weights of the ranks from a checkpoint of all, moved before."""
    model = parallelize_experts(CASES["a model"].build())
    try:
        model.save_pretrained(folder)
        said = ""
    except ValueError as error:
        said = str(error)
    checkpoint.save(model.state_dict(), checkpoint_id=folder)
    wanted = [weight.detach().clone() for weight in model.parameters()]
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    checkpoint.load(model.state_dict(), checkpoint_id=folder)
    return said, [found - weight for found, weight in zip(model.parameters(), wanted, strict=True)]


def resumed(folder: str, go_on: bool) -> dict[str, Tensor]:
    """Weights, by their published names, after four steps on the same tokens. The checkpoint of all ranks is written
    after the second; with ``go_on`` the first two are not trained but read from it, by a new model and optimizer."""
    model = parallelize_experts(CASES["a model"].build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    whole = {"model": model.state_dict(), "optimizer": OptimizerState(model, optimizer)}
    if go_on:
        checkpoint.load(whole, checkpoint_id=folder)
    for step in range(2 if go_on else 0, 4):
        optimizer.zero_grad()
        model(IDS + step)[0].square().sum().backward()
        average_gradients(model)
        optimizer.step()
        if step == 1:
            checkpoint.save(whole, checkpoint_id=folder)
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def listening() -> list[str]:
    """Addresses on which this process waits for connections, by the kernel's tables (Linux)."""
    dist.barrier()
    own = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            _, address, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in own:
                found.append(address.split(":")[0])
    return found
