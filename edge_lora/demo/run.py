"""The demo: export a real language model once, switch skills under it, measure everything."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from statistics import median
from typing import Any

from edge_lora.bundle import MANIFEST
from edge_lora.demo.recipe import HELD_OUT_SEED, MAX_ANSWER_TOKENS, RECIPES, train_skill
from edge_lora.demo.skills import Example, exact_match, get_skill
from edge_lora.errors import EdgeLoraError
from edge_lora.runtime import Session, open_bundle
from edge_lora.runtime.bench.measure import device, interleave
from edge_lora.runtime.canary import canary_feeds
from edge_lora.runtime.generate import generate
from edge_lora.runtime.text import tokenizer_of

BASE = "smollm2"
SWAPS = 30
LATENCY_RUNS = 50
CPU_STEPS = 150
Say = Callable[[str], None]


@dataclass(frozen=True)
class SkillResult:
    """What one adapter does and costs.

    Attributes:
        skill: Name.
        method: Training method.
        file_bytes: Size of the adapter file.
        base_accuracy: Exact match of the base on held-out examples.
        accuracy: Exact match with the adapter fused.
        swap_ms: Median time of a switch from the base to it.
        base_ms: Median time of a run over four tokens, base.
        fused_ms: The same, adapter fused.
        unfused_ms: The same, adapter fed beside the weights; None if it is not low-rank.
        examples: (prompt, the base's answer, the adapted answer), a few.
    """

    skill: str
    method: str
    file_bytes: int
    base_accuracy: float
    accuracy: float
    swap_ms: float
    base_ms: float
    fused_ms: float
    unfused_ms: float | None
    examples: list[tuple[str, str, str]]


@dataclass(frozen=True)
class DemoReport:
    """Everything that the demo shows.

    Attributes:
        route: How adapters were switched.
        skills: One result per adapter.
        base_restored: Whether the weights in use ended as the base's, every byte compared.
        image_sha256: Digest of the base in the engine's memory, before and after.
        switches: How many switches were made in between.
        device: What it ran on.
    """

    route: str
    skills: list[SkillResult]
    base_restored: bool
    image_sha256: str
    switches: int
    device: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def run_demo(
    out: Path, *, examples: int = 40, threads: int | None = None, train: str | None = None,
    steps: int | None = None, say: Say = lambda _: None,
) -> DemoReport:  # fmt: skip
    """Export, open, switch, generate, measure.

    Args:
        out: Folder for the bundle (made once) and for a trained adapter.
        examples: Held-out examples per skill.
        threads: Of the engine; default: all processors.
        train: Train this skill's adapter here instead of taking the one that ships.
        steps: Optimizer steps of that training; default: 150.
        say: Told what is being done.
    """
    bundle = _bundle(out, say)
    trained = {train: _train(train, out, steps, say)} if train else {}
    with _shipped_adapters() as shipped, open_bundle(bundle, threads=threads) as session:
        say(f"opened on route {session.route!r}")
        before = session.image_sha256()
        results, switches = [], 0
        for skill, path in {**shipped, **trained}.items():
            say(f"skill {skill!r}")
            session.load_adapter(path, skill)
            results.append(_measure(session, skill, path, examples))
            switches += 2 * (SWAPS + LATENCY_RUNS)
        for names in itertools.permutations(session.adapters):  # back and forth, every order
            for name in names:
                session.set_adapter(name)
                switches += 1
        session.disable_adapters()
        restored = session.image_sha256() == before and not session.differing_slots()
        return DemoReport(session.route, results, restored, before, switches, device())


def _bundle(out: Path, say: Say) -> Path:
    folder = out / f"{BASE}-bundle"
    if (folder / MANIFEST).is_file():
        say(f"bundle '{folder}' exists, exported before")
        return folder
    from edge_lora.bases import load_model
    from edge_lora.export import export_bundle

    say(f"export {BASE} once, with slots (about a minute)")
    base = load_model(BASE)
    out.mkdir(parents=True, exist_ok=True)
    export_bundle(
        base.model,
        folder,
        task="causal-lm",
        slots="inputs",
        base_id=base.id,
        tokenizer=base.tokenizer,
    )
    return folder


def _train(skill: str, out: Path, steps: int | None, say: Say) -> Path:
    from edge_lora.bases import load_model

    get_skill(skill)
    # A tenth of what the shipped adapters saw: minutes on two cores, and still most answers right.
    recipe = replace(RECIPES[skill], batch_size=16, calibration_batches=4)
    say(f"train skill {skill!r} on the CPU, {steps or CPU_STEPS} steps")
    base = load_model(BASE)
    adapter = train_skill(
        base.model,
        base.tokenizer,
        recipe,
        steps=steps or CPU_STEPS,
        checkpoint_dir=out / f"{skill}-training",
    )
    return adapter.save(out / f"{skill}.safetensors")


@contextmanager
def _shipped_adapters() -> Iterator[dict[str, Path]]:
    """Yield skill name -> path of the adapter that ships with the package."""
    with as_file(files("edge_lora.demo") / "adapters") as folder:
        paths = {skill: folder / f"{skill}.safetensors" for skill in RECIPES}
        missing = [str(path) for path in paths.values() if not path.is_file()]
        if missing:
            raise EdgeLoraError(f"the package lacks {', '.join(missing)}; install it again")
        yield paths


def _measure(session: Session, skill: str, path: Path, count: int) -> SkillResult:
    """Measure one loaded adapter; the session is at the base before and after."""
    held_out = get_skill(skill).generate(HELD_OUT_SEED, count, "held-out")
    base_answers = _answers(session, held_out)
    with session.using(skill):
        answers = _answers(session, held_out)
    times = []
    for _ in range(SWAPS):
        times.append(session.set_adapter(skill).ms)
        session.disable_adapters()
    low_rank = all(set(d.form_names) == {"low_rank"} for d in session.header(skill).deltas.values())
    latency = _latency(session, skill, unfused=low_rank)
    return SkillResult(
        skill=skill,
        method=session.header(skill).method,
        file_bytes=path.stat().st_size,
        base_accuracy=exact_match(base_answers, held_out),
        accuracy=exact_match(answers, held_out),
        swap_ms=median(times),
        base_ms=latency["base"],
        fused_ms=latency["fused"],
        unfused_ms=latency.get("unfused"),
        examples=[
            (example.prompt, base.strip().split("\n")[0], adapted.strip())
            for example, base, adapted in zip(held_out, base_answers, answers, strict=True)
        ][:3],
    )


def _answers(session: Session, examples: Sequence[Example]) -> list[str]:
    tokenizer = tokenizer_of(session.folder)
    prompts = [tokenizer.encode(example.prompt).ids for example in examples]
    result = generate(session, prompts, max_new_tokens=MAX_ANSWER_TOKENS)
    return [str(tokenizer.decode(tokens)) for tokens in result.tokens]


def _latency(session: Session, skill: str, unfused: bool) -> dict[str, float]:
    """Return median ms of the canary run: base, fused and unfused, interleaved."""
    feeds = canary_feeds(session.manifest)

    def fuse() -> None:
        session.set_adapter(skill)
        session.run(feeds)  # the first run after a switch is not a steady one

    actions: dict[str, Callable[[], object]] = {
        "base": lambda: session.run(feeds),
        "fused": lambda: session.run(feeds),
    }
    before: dict[str, Callable[[], object]] = {"base": session.disable_adapters, "fused": fuse}
    if unfused:
        actions["unfused"] = lambda: session.run(feeds, adapter=skill)
        before["unfused"] = session.disable_adapters
    samples = interleave(actions, LATENCY_RUNS, before=before)
    session.disable_adapters()
    return {name: times.median for name, times in samples.items()}
