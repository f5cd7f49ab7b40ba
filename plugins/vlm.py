"""A vision-language model as judge: does the picture show what the prompt asks for?

It is behind an endpoint (`@url`) or on this machine (`@model`). The embedded policy needs neither: the shapes world has
a judge of its own. See docs/rewards/vlm.md.
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
    from unigrpo_plugins.judge_modes import Question, Reading
    from unigrpo_plugins.judge_shapes import ShapesJudge

AXES = "alignment:2 quality:1"


class VlmOptions(Options):
    url: str | None = Field(
        None, description="address of a server with OpenAI's chat completions, e.g. http://localhost:8000/v1"
    )
    model: str | None = Field(
        None,
        description="with @url: name of a model of the server, default its only one; without: hub id or directory of "
        "an image-text-to-text model to run on this machine",
    )
    mode: Literal["auto", "yes_no", "rubric", "checklist", "text"] = Field(
        "auto",
        description="yes_no: P(yes) of the first token; rubric: grades as JSON; checklist: P(yes) of each of the "
        "prompt's `questions` or GenEval clauses; text: a number from 0 to 10; auto: yes_no if the judge gives "
        "log-probabilities, else rubric if it follows a schema, else text",
    )
    axes: str = Field(AXES, description="axes of the rubric, with weights")
    body: str = Field("", description="JSON object merged into every request; null removes a field")
    concurrency: int = Field(16, ge=1, le=256, description="parallel requests")
    batch_size: int = Field(64, ge=1, description="samples per call")
    connect_timeout_s: float = Field(10.0, gt=0, description="limit of seconds to connect")
    read_timeout_s: float = Field(60.0, gt=0, description="limit of seconds between two reads")
    deadline_s: float = Field(90.0, gt=0, description="limit of seconds for one question with its retries")
    attempts: int = Field(12, ge=1, description="limit of tries for one question")
    backoff_s: float = Field(0.5, ge=0, description="longest wait before the first retry, in seconds; doubles up to 20")
    breaker: int = Field(8, ge=1, description="stop the run after this many questions in a row without an answer")
    cache: Literal["auto", "on", "off"] = Field(
        "auto", description="keep answers of a @url in a file; auto: in evaluation only"
    )
    price_in: float = Field(0.0, ge=0, description="price of a million prompt tokens, for the estimated cost")
    price_out: float = Field(0.0, ge=0, description="price of a million completion tokens")
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="of a model on this machine; auto: fp32 on a CPU, else bf16"
    )
    local_batch_size: int = Field(8, ge=1, description="pictures per forward pass of a model on this machine")

    @field_validator("cache", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        """Options are YAML, where on and off are booleans."""
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
    """A vision-language model's verdict on picture and prompt. It never sees the policy's reasoning."""

    name = "vlm"
    summary = "a vision-language judge: behind an endpoint, on this machine, or of the shapes world"
    range = (0.0, 1.0)
    needs = frozenset({"image"})
    licence = "that of the chosen model or service; shapes world: ours"
    Options = VlmOptions

    def __init__(self, options: VlmOptions):
        self.options = options
        self.batch_size = options.batch_size
        self.concurrency = options.concurrency if options.url else 0  # 0: computes on this machine
        self.mode: str = options.mode
        self.judge: EndpointJudge | LocalJudge | ShapesJudge | None = None

    def __repr__(self) -> str:
        return f"VlmReward(mode={self.mode!r}, model={self.options.model!r})"

    def check_options(self, context: RewardContext, metadata: Sequence[Mapping[str, Any]]) -> None:
        if self.options.url is None and self.options.model is None and not context.embedded:
            raise RewardError(
                "reward 'vlm': no judge was named; write vlm@url=http://localhost:8000/v1@model=NAME, or "
                "vlm@model=DIRECTORY for a model on this machine"
            )

    def setup(self, context: RewardContext) -> None:
        """Open the judge and find the way to ask it."""
        self.check_options(context, ())
        o = self.options
        try:
            if o.url is not None:
                self._open_endpoint(o.url)
            elif o.model is not None:
                self._open_local(context, o.model)
            else:
                self._open_shapes()
        except BaseException:
            self.teardown()
            raise

    def check_metadata(self, metadata: Sequence[Mapping[str, Any]]) -> None:
        """With @mode=checklist every prompt needs questions."""
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
        from unigrpo_plugins.judge_modes import Question

        if self.mode == "checklist":
            return self._score_checklists(batch)
        readings = self._read(batch, [(k, Question(prompt)) for k, prompt in enumerate(batch.prompts)])
        assert self.judge is not None
        parts = {p: [r.parts.get(p, math.nan) for r in readings] for p in self.judge.form.parts}
        return RewardOutput([r.value for r in readings], components=parts, info=[_info(r) for r in readings])

    def figures(self) -> dict[str, float]:
        """Calls, retries, tokens, cache hits, seconds and estimated cost so far; empty before `setup`."""
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
        if figures:
            shown = (f"{name} {v:.4g}" if isinstance(v, float) else f"{name} {v}" for name, v in figures.items())
            print(f"vlm: {', '.join(shown)}", file=sys.stderr)

    def _open_shapes(self) -> None:
        from unigrpo_plugins.judge_modes import axes_of
        from unigrpo_plugins.judge_shapes import ShapesJudge

        self.judge = ShapesJudge(self.mode, axes_of(self.options.axes))
        self.mode = "yes_no" if self.mode == "auto" else self.mode
        print(f"vlm: the shapes world's own judge, mode {self.mode}", file=sys.stderr)

    def _open_local(self, context: RewardContext, model: str) -> None:
        from unigrpo_plugins.judge_local import LocalJudge

        if self.mode not in ("auto", "yes_no", "checklist"):
            raise RewardError(
                f"reward 'vlm': a model on this machine takes @mode=yes_no or checklist, not {self.mode}; serve it "
                "and give its @url for the others"
            )
        self.judge = LocalJudge(context, model, self.options.precision, self.options.local_batch_size)
        self.mode = "yes_no" if self.mode == "auto" else self.mode

    def _open_endpoint(self, url: str) -> None:
        from unigrpo_plugins import judge_endpoint
        from unigrpo_plugins.judge_cache import AnswerCache, default_path
        from unigrpo_plugins.judge_client import Endpoint, Patience, key_from_environment
        from unigrpo_plugins.judge_modes import axes_of

        o = self.options
        patience = Patience(
            connect_s=o.connect_timeout_s,
            read_s=o.read_timeout_s,
            deadline_s=o.deadline_s,
            attempts=o.attempts,
            backoff_s=o.backoff_s,
            breaker=o.breaker,
        )
        endpoint = Endpoint(url, key_from_environment(), patience)
        try:
            model = judge_endpoint.find_model(endpoint, o.model)
            extra = json.loads(o.body or "{}")
            form, failed = judge_endpoint.find_form(endpoint, model, o.mode, axes_of(o.axes), extra)
        except BaseException:
            endpoint.close()
            raise
        cache = None if o.cache == "off" else AnswerCache(default_path())
        self.judge = judge_endpoint.EndpointJudge(
            endpoint, model, form, extra=extra, concurrency=o.concurrency, cache=cache
        )
        if o.mode == "auto":
            self.mode = {"logprobs": "yes_no", "json_schema": "rubric", "text": "text"}[form.name]
        before = f" ({failed})" if failed else ""
        print(f"vlm: {model} at {url}, mode {self.mode}, answers by {form.name}{before}", file=sys.stderr)

    def _read(self, batch: RewardBatch, asked: list[tuple[int, Question]]) -> list[Reading]:
        assert self.judge is not None, "setup comes first"
        remember = self.options.cache == "on" or (self.options.cache == "auto" and batch.split == "eval")
        return self.judge.read(batch.images, asked, remember=remember)

    def _score_checklists(self, batch: RewardBatch) -> RewardOutput:
        from unigrpo_plugins.judge_modes import KINDS, checklist

        lists = [checklist(metadata) for metadata in batch.metadata]
        readings = iter(self._read(batch, [(k, item.asked()) for k, items in enumerate(lists) for item in items]))
        scores, info = [], []
        parts: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for items in lists:
            own = [(item, next(readings)) for item in items]
            values = [item.value(reading) for item, reading in own]
            # NaN stays NaN: a mean over the answered questions would be that of another checklist.
            scores.append(math.fsum(values) / len(values))
            for kind in KINDS:
                of_kind = [v for item, v in zip(items, values, strict=True) if item.kind == kind]
                parts[kind].append(math.fsum(of_kind) / len(of_kind) if of_kind else math.nan)
            rows = [
                {"question": item.question, "value": None if reading.why else value, **_info(reading)}
                for (item, reading), value in zip(own, values, strict=True)
            ]
            info.append({"questions": rows})
        return RewardOutput(scores, components=parts, info=info)


def _info(reading: Reading) -> dict[str, Any]:
    facts = {"reason": reading.remark, "abstained": reading.why, "call": dict(reading.call)}
    return {name: fact for name, fact in facts.items() if fact}
