"""A mixture of 8 experts beside the base model: gates per recording, per position, the top 2, merged, and the two-pass form of X-LoRA.

    python -m benchmarks.moe                       whisper-small's sizes, one thread
    python -m benchmarks.moe --arms gated two_pass --rounds 3

Random weights of the published sizes, fp32. 8 experts of rank 8 on all six linear types of encoder and decoder, and no new expert. Arms:

    base             the model alone
    gated            all experts, one set of gates per recording and weight (router="utterance")
    top2             the same, the two largest gates only
    with_new         gated, and a new always-on expert of rank 8
    merged           the gates of this recording merged into the weights
    token            all experts, a set of gates per position (router="token")
    two_pass         X-LoRA's form: a pass of the base model to compute the gates, a second with a loop over the experts in every layer.
                     (PEFT's own X-LoRA does not run on Whisper.)

Stages: the encoder on one recording of 30 seconds, the encoder on a batch of recordings that differ in their gates, and a token step. In
the batch, no two rows share a weight: what training pays for.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks._measure import RESULTS, Arms, count_operators, provenance, summary, table, time_rounds, use_threads, write_results
from benchmarks.s2lora import ALL_LINEAR, CLOCKS, MODELS, Sizes, adapted, features, whisper

if TYPE_CHECKING:
    import torch
    from torch import nn

NUM_EXPERTS, RANK = 8, 8
ARMS = ("base", "gated", "top2", "with_new", "merged", "token", "two_pass")
BATCH_ARMS = ("base", "gated", "top2", "with_new", "token", "two_pass")  # a batch cannot be merged
STAGES = ("encoder", "encoder_batch", "token_step")
ROUNDS = 7
STEPS_AT_ONCE = 10


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    model: Literal["tiny", "small"] = "small"
    """Whose sizes."""
    rounds: int = ROUNDS
    """Times every arm is measured."""
    arms: tuple[str, ...] = ()
    """Only these, and the base; left out, all."""
    batch_size: int = 4
    """Recordings of the batch; 0 leaves that stage out."""
    threads: int = 1
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: the time that this process had the processor, to try something out while the machine is busy. No figures for publication."""
    out: Path = RESULTS
    """Folder for the JSON."""

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown:
            raise ValueError(f"No arm {unknown[0]!r} here. Known: {', '.join(ARMS)}.")


def write_experts(folder: Path, base: nn.Module) -> dict[str, str]:
    """8 LoRA adapters with random weights, small enough that the model's numbers stay finite."""
    import torch
    from peft import LoraConfig

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ALL_LINEAR)
    model = adapted(copy.deepcopy(base), config)
    for index in range(NUM_EXPERTS):
        torch.manual_seed(100 + index)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.02)
        model.save_pretrained(str(folder / f"e{index}"), save_embedding_layers=False)
    return {f"e{index}": str(folder / f"e{index}") for index in range(NUM_EXPERTS)}


class Reader:
    """One arm: encodes, and takes token steps on what it encoded."""

    def __init__(self, arm: str, sizes: Sizes, base: nn.Module, experts: dict[str, str], batch_size: int) -> None:
        self.arm = arm
        self.model: Any = make_arm(arm, copy.deepcopy(base), experts).eval()
        self.features = features(1, sizes.frames)
        self.batch = features(batch_size, sizes.frames)
        if arm == "merged":
            self._merge()

    def _merge(self) -> None:
        """Merge the gates that the router gives this recording."""
        from whisper_moe import record_gates, use_gates

        start = self._start()
        with record_gates(self.model) as report:
            self.model(input_features=self.features, decoder_input_ids=start)
        with use_gates(self.model, report):
            for layer in moe_layers(self.model):
                layer.merge()

    def _start(self) -> torch.Tensor:
        import torch

        return torch.ones(1, 1, dtype=torch.long)

    def encode(self) -> Any:
        return self._encode(self.features)

    def encode_batch(self) -> Any:
        return self._encode(self.batch)

    def _encode(self, sound: torch.Tensor) -> Any:
        encoder = self.model.get_encoder()
        if self.arm == "two_pass":
            with passes_of(self.model).first():
                encoder(sound)
        return encoder(sound)

    def begin(self) -> None:
        """Encode, and take the first step, which also fills the cache with what the encoder has heard."""
        self.encoded = self.encode()
        self.cache: Any = None
        self.token = self._start()
        self.step()

    def step(self) -> None:
        """One more token, the one that seemed likeliest."""
        options = {"encoder_outputs": self.encoded, "decoder_input_ids": self.token, "past_key_values": self.cache, "use_cache": True}
        output = self.model(**options)
        self.cache = output.past_key_values
        self.token = output.logits[:, -1:].argmax(-1)  # (1, 1)

    def steps(self) -> None:
        for _ in range(STEPS_AT_ONCE):
            self.step()


def moe_layers(model: nn.Module) -> list[Any]:
    from whisper_moe import LoraMoeLayer

    return [module for module in model.modules() if isinstance(module, LoraMoeLayer)]


def make_arm(arm: str, base: nn.Module, experts: dict[str, str]) -> nn.Module:
    """The model of an arm."""
    import torch

    from whisper_moe import LoraMoeConfig

    torch.manual_seed(3)
    if arm == "base":
        return base
    if arm == "two_pass":
        return two_pass(base, experts)
    config = LoraMoeConfig(
        r=RANK,
        experts=experts,
        router="token" if arm == "token" else "utterance",
        top_k=2 if arm == "top2" else None,
        new_expert=arm == "with_new",
    )
    model = adapted(base, config).get_base_model()
    with torch.no_grad():
        for layer in moe_layers(model):
            for parameter in (*layer.loramoe_router_weight.values(), *layer.loramoe_B.values()):
                parameter.normal_(std=0.02)
    return model


# ---- X-LoRA's form -----------------------------------------------------------------------------------------------------


class Passes:
    """What the layers of the two-pass arm share: whether this is the first pass, and the gates that it led to."""

    def __init__(self, num_layers: int) -> None:
        import torch
        from torch import nn

        self.active = True
        self.head = nn.Linear(1, num_layers * NUM_EXPERTS)
        self.num_layers = num_layers
        self.gates = torch.zeros(0)  # (rows, positions, layers, experts)

    def first(self) -> Any:
        """The first pass: experts off."""
        from contextlib import contextmanager

        @contextmanager
        def off() -> Any:
            self.active = False
            yield
            self.active = True

        return off()


def passes_of(model: nn.Module) -> Passes:
    return next(module.passes for module in model.modules() if isinstance(getattr(module, "passes", None), Passes))  # type: ignore[return-value]


def two_pass(base: nn.Module, experts: dict[str, str]) -> nn.Module:
    """The encoder's linear layers with PEFT's own LoRA experts, gated as PEFT's X-LoRA does it: each expert's input is scaled in turn."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from torch import nn

    names = list(experts)
    loras = PeftModel.from_pretrained(base, experts[names[0]], adapter_name=names[0])
    for name in names[1:]:
        loras.load_adapter(experts[name], name)
    model = loras.get_base_model()

    class TwoPass(nn.Module):
        def __init__(self, lora: Any, passes: Passes, index: int) -> None:
            super().__init__()
            self.lora, self.passes, self.index = lora, passes, index

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.lora.base_layer(x)
            if not self.passes.active:
                return y
            gates = self.gates_for(x)
            for expert, name in enumerate(names):
                y = y + self.lora.lora_B[name](self.lora.lora_A[name](x * gates[:, :, expert, None])) * self.lora.scaling[name]
            return y

        def gates_for(self, x: torch.Tensor) -> torch.Tensor:  # (rows, positions, experts)
            return self.passes.gates[: x.shape[0], : x.shape[1], self.index]

    import torch

    encoder = model.get_encoder()
    places = [(parent, name) for parent in encoder.modules() for name, child in parent.named_children() if isinstance(child, LoraLayer)]
    passes = Passes(len(places))
    config = model.config
    # The classifier's own cost is left out, in X-LoRA's favour: the gates of every position, layer and expert are there already.
    passes.gates = torch.rand(16, config.max_source_positions, len(places), NUM_EXPERTS).softmax(-1)
    for index, (parent, name) in enumerate(places):
        setattr(parent, name, TwoPass(getattr(parent, name), passes, index))
    return model


# ---- the run -----------------------------------------------------------------------------------------------------------


def measure(sizes: Sizes, arms: list[str], rounds: int, batch_size: int, *, threads: int = 1, clock: str = "wall") -> dict[str, Any]:
    """Time and operators of every arm, and the ratios to the base and to the two-pass form."""
    import torch

    use_threads(threads)
    base = whisper(sizes).eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        experts = write_experts(Path(folder), base)
        readers = {arm: Reader(arm, sizes, base, experts, max(batch_size, 1)) for arm in arms}
        stages: dict[str, Arms] = {"encoder": {arm: reader.encode for arm, reader in readers.items()}}
        if batch_size:
            stages["encoder_batch"] = {arm: reader.encode_batch for arm, reader in readers.items() if arm in BATCH_ARMS}
        stepping = {arm: reader for arm, reader in readers.items() if arm != "two_pass"}  # its decoder is out of this comparison
        stages["token_step"] = {arm: reader.steps for arm, reader in stepping.items()}
        for reader in stepping.values():
            reader.begin()
        seconds = time_rounds(stages, rounds, clock=CLOCKS[clock], progress=True)
        seconds["token_step"] = {arm: [took / STEPS_AT_ONCE for took in rows] for arm, rows in seconds["token_step"].items()}
        operators = {arm: {"encoder": count_operators(reader.encode)} for arm, reader in readers.items()}
        for arm, reader in stepping.items():
            operators[arm]["token_step"] = count_operators(reader.step)
    rows = {stage: summary(seconds[stage], ("base", "two_pass")) for stage in seconds}
    return {"summary": rows, "operators": operators, "seconds": seconds}


def results_table(results: dict[str, Any]) -> str:
    """A line for each arm, two figures for each stage: milliseconds, and the ratio to the base."""
    stages = [stage for stage in STAGES if stage in results["summary"]]
    header = ["arm", *(column for stage in stages for column in (f"{stage.replace('_', ' ')} ms", "to base")), "operators", "a step"]
    lines = []
    for arm, operators in results["operators"].items():
        rows = [results["summary"][stage].get(arm) for stage in stages]
        figures = [
            text
            for row in rows
            for text in (("-", "-") if row is None else (f"{row['seconds'] * 1000:,.1f}", f"{row['to_base']['median']:.3f}"))
        ]
        lines.append([arm, *figures, str(operators["encoder"]), str(operators.get("token_step", "-"))])
    return table(header, lines)


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    arms = [arm for arm in ARMS if not settings.arms or arm in settings.arms or arm == "base"]
    results = measure(MODELS[settings.model], arms, settings.rounds, settings.batch_size, threads=settings.threads, clock=settings.clock)
    header = provenance() | {
        "model": {"name": settings.model, **vars(MODELS[settings.model])},
        "mixture": {"experts": NUM_EXPERTS, "rank": RANK, "target_modules": ALL_LINEAR},
        "rounds": settings.rounds,
        "batch_size": settings.batch_size,
        "clock": settings.clock,
    }
    path = write_results(settings.out, "moe", settings.model, header | results)
    print(f"\nwhisper-{settings.model} sizes, {settings.rounds} rounds, {settings.threads} thread(s)\n{results_table(results)}\n{path}\n")


if __name__ == "__main__":
    main()
