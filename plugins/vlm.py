"""A vision-language model as judge: does the picture show what was asked for?

Behind an endpoint (`@url`), on this machine (`@model`), or, with the embedded policy and neither, a stand-in that
sees the shapes world and speaks the same protocol. See docs/rewards/vlm.md.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from unigrpo_cli import Options, RewardBatch, RewardContext, RewardOutput
from unigrpo_cli.errors import RewardError

if TYPE_CHECKING:
    from unigrpo_plugins.judge_endpoint import EndpointJudge
    from unigrpo_plugins.judge_local import LocalJudge
    from unigrpo_plugins.judge_modes import Reading

AXES = "alignment:2 quality:1"


class VlmOptions(Options):
    url: str | None = Field(
        None, description="of a server with OpenAI's chat completions, e.g. http://localhost:8000/v1"
    )
    model: str | None = Field(
        None,
        description="with @url: which of its models, default its only one; without: hub id or directory of an "
        "image-text-to-text model to run here",
    )
    mode: Literal["auto", "yes_no", "rubric", "checklist", "text"] = Field(
        "auto",
        description="yes_no: P(yes) of the first token; rubric: grades as JSON; checklist: P(yes) of each of the "
        "prompt's `questions` or GenEval clauses; text: a number from 0 to 10; auto: yes_no where the judge gives "
        "log-probabilities, else rubric where it follows a schema, else text",
    )
    axes: str = Field(AXES, description="of the rubric, with weights")
    body: str = Field("", description="JSON object merged into every request; null takes a field out")
    concurrency: int = Field(16, ge=1, le=256, description="questions at once")
    batch_size: int = Field(64, ge=1, description="samples in one call")
    connect_timeout_s: float = Field(10.0, gt=0, description="to reach the server")
    read_timeout_s: float = Field(60.0, gt=0, description="without a byte from it")
    deadline_s: float = Field(90.0, gt=0, description="for one question with all its tries")
    attempts: int = Field(12, ge=1, description="tries for one question")
    backoff_s: float = Field(0.5, ge=0, description="longest wait before the second try; doubles up to 20 s")
    breaker: int = Field(8, ge=1, description="questions in a row without an answer that stop the run")
    cache: Literal["auto", "on", "off"] = Field(
        "auto", description="keep answers of a @url in a file; auto: in evaluation, not in training"
    )
    price_in: float = Field(0.0, ge=0, description="of a million prompt tokens, for the estimated cost")
    price_out: float = Field(0.0, ge=0, description="of a million tokens of answers")
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="of a model run here; auto: fp32 on a CPU, else bf16"
    )
    local_batch_size: int = Field(8, ge=1, description="pictures in one forward of a model run here")

    @field_validator("cache", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        """YAML, which options are written in, reads on and off as truth values."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @field_validator("axes")
    @classmethod
    def _axes(cls, text: str) -> str:
        from unigrpo_plugins.judge_modes import axes_of

        axes_of(text)
        return text

    @field_validator("body")
    @classmethod
    def _body(cls, text: str) -> str:
        try:
            given = json.loads(text or "{}")
        except RecursionError:
            given = None
        if not isinstance(given, dict):
            raise ValueError("write a JSON object")
        return text


class VlmReward:
    """A vision-language model's verdict on picture and prompt; the policy's reasoning is never shown to it."""

    name = "vlm"
    summary = "a vision-language judge: endpoint, local model, or the shapes world's stand-in"
    range = (0.0, 1.0)
    needs = frozenset({"image"})
    licence = "that of the chosen model or service; stand-in: ours"
    Options = VlmOptions

    def __init__(self, options: VlmOptions):
        self.options = options
        self.batch_size = options.batch_size
        self.concurrency = 0 if options.model and not options.url else options.concurrency  # 0: computes here
        self.mode: str = options.mode
        self.judge: EndpointJudge | LocalJudge | None = None
        self.server: Any = None

    def __repr__(self) -> str:
        return f"VlmReward(mode={self.mode!r}, model={self.options.model!r})"

    def setup(self, context: RewardContext) -> None:
        """Find the judge and how it can be asked; says which it is.

        Raises:
            RewardError: when there is none, or it cannot be asked in this mode.
        """
        o = self.options
        try:
            if o.url is None and o.model is not None:
                self._set_up_local(context, o.model)
            elif o.url is not None or context.embedded:
                self._set_up_endpoint()
            else:
                raise RewardError(
                    "reward 'vlm': say who judges, e.g. vlm@url=http://localhost:8000/v1@model=NAME, or "
                    "vlm@model=DIRECTORY for a model run here"
                )
        except BaseException:
            self.teardown()
            raise

    def check_metadata(self, metadata: Sequence[Mapping[str, Any]]) -> None:
        """In a checklist every prompt has something to check."""
        from unigrpo_plugins.judge_modes import checklist

        for row in metadata if self.mode == "checklist" else ():
            try:
                checklist(row)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise RewardError(
                    f"reward 'vlm' with @mode=checklist: prompt {row.get('prompt', '')!r}: {error}; give "
                    "`questions` in a .jsonl file, or choose another mode"
                ) from None

    def score(self, batch: RewardBatch) -> RewardOutput:
        from unigrpo_plugins.judge_modes import Matter

        if self.mode == "checklist":
            return self._score_checklists(batch)
        readings = self._read(batch, [(k, Matter(prompt)) for k, prompt in enumerate(batch.prompts)])
        assert self.judge is not None
        parts = {p: [r.parts.get(p, math.nan) for r in readings] for p in self.judge.form.parts}
        return RewardOutput([r.value for r in readings], components=parts, info=[_remarks(r) for r in readings])

    def figures(self) -> dict[str, float]:
        """Calls, tries, tokens, hits, seconds and estimated cost so far; empty before `setup`."""
        if self.judge is None:
            return {}
        o, figures = self.options, self.judge.figures()
        tokens = figures.get("prompt_tokens", 0), figures.get("completion_tokens", 0)
        return {**figures, "cost": (tokens[0] * o.price_in + tokens[1] * o.price_out) / 1e6}

    def teardown(self) -> None:
        figures = self.figures()
        if self.judge is not None:
            self.judge.close()
            self.judge = None
        if self.server is not None:
            self.server.stop()
            self.server = None
        if figures:
            shown = (f"{name} {v:.4g}" if isinstance(v, float) else f"{name} {v}" for name, v in figures.items())
            print(f"vlm: {', '.join(shown)}", file=sys.stderr)

    def _set_up_local(self, context: RewardContext, model: str) -> None:
        from unigrpo_plugins.judge_local import LocalJudge

        if self.mode not in ("auto", "yes_no", "checklist"):
            raise RewardError(
                f"reward 'vlm': a model run here is asked with @mode=yes_no or checklist, not {self.mode}; serve "
                "it and give its @url for the others"
            )
        self.judge = LocalJudge(context, model, self.options.precision, self.options.local_batch_size)
        self.mode = "yes_no" if self.mode == "auto" else self.mode

    def _set_up_endpoint(self) -> None:
        from unigrpo_plugins import judge_endpoint
        from unigrpo_plugins.judge_cache import AnswerCache, default_path
        from unigrpo_plugins.judge_client import Endpoint, Patience, key_from_environment
        from unigrpo_plugins.judge_modes import axes_of
        from unigrpo_plugins.judge_server import JudgeServer

        o, url, key = self.options, self.options.url, None
        if url is None:
            self.server = JudgeServer().start()
            url = self.server.url
        else:
            key = key_from_environment()  # not for the stand-in: it needs none
        patience = Patience(
            connect_s=o.connect_timeout_s,
            read_s=o.read_timeout_s,
            deadline_s=o.deadline_s,
            attempts=o.attempts,
            backoff_s=o.backoff_s,
            breaker=o.breaker,
        )
        endpoint = Endpoint(url, key, patience)
        try:
            model = judge_endpoint.find_model(endpoint, o.model)
            axes, extra = axes_of(o.axes), json.loads(o.body or "{}")
            form, before = judge_endpoint.find_form(endpoint, model, o.mode, axes, extra)
        except BaseException:
            endpoint.close()
            raise
        # the stand-in's address is new each time: its answers would never be found again
        cache = AnswerCache(default_path()) if o.cache != "off" and self.server is None else None
        self.judge = judge_endpoint.EndpointJudge(
            endpoint, model, form, extra=extra, concurrency=o.concurrency, cache=cache
        )
        if o.mode == "auto":
            self.mode = {"logprobs": "yes_no", "json_schema": "rubric", "text": "text"}[form.name]
        because = f" ({before})" if before else ""
        print(f"vlm: {model} at {url} is asked by {self.mode}, answers by {form.name}{because}", file=sys.stderr)

    def _read(self, batch: RewardBatch, asked: list) -> list[Reading]:
        assert self.judge is not None, "setup comes first"
        remember = self.options.cache == "on" or (self.options.cache == "auto" and batch.split == "eval")
        return self.judge.read(batch.images, asked, remember=remember)

    def _score_checklists(self, batch: RewardBatch) -> RewardOutput:
        from unigrpo_plugins.judge_modes import KINDS, checklist

        lists = [checklist(metadata) for metadata in batch.metadata]
        asked = [(k, atom.matter()) for k, atoms in enumerate(lists) for atom in atoms]
        readings = iter(self._read(batch, asked))
        scores, info = [], []
        parts: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for atoms in lists:
            read = [next(readings) for _ in atoms]
            values = [atom.value(r) for atom, r in zip(atoms, read, strict=True)]
            # one open question leaves the whole open: the mean of the rest would be of another checklist
            scores.append(math.fsum(values) / len(values))
            for kind in KINDS:
                own = [v for atom, v in zip(atoms, values, strict=True) if atom.kind == kind]
                parts[kind].append(math.fsum(own) / len(own) if own else math.nan)
            info.append(
                {
                    "questions": [
                        {"question": a.question, "value": None if r.why else v, **_remarks(r)}
                        for a, v, r in zip(atoms, values, read, strict=True)
                    ]
                }
            )
        return RewardOutput(scores, components=parts, info=info)


def _remarks(reading: Reading) -> dict[str, Any]:
    facts = {"reason": reading.remark, "abstained": reading.why, "call": dict(reading.call)}
    return {name: fact for name, fact in facts.items() if fact}
