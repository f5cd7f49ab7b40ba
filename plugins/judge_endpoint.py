"""A judge behind an endpoint: find its model and the way it can answer, then ask many questions in parallel."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from unigrpo_cli.errors import RewardError
from unigrpo_plugins.judge_cache import AnswerCache, key_of
from unigrpo_plugins.judge_client import Answer, Endpoint, StatusError, UnansweredError, in_parallel
from unigrpo_plugins.judge_modes import (
    Form,
    Question,
    Rating,
    Reading,
    Rubric,
    YesNoOdds,
    YesNoWord,
    fenced,
    no_opinion,
)

if TYPE_CHECKING:
    from PIL.Image import Image

JPEG_ABOVE, JPEG_QUALITY = 512, 90  # pixels of the longer side; a larger PNG is slow to send


def data_url(image: Image) -> str:
    file = io.BytesIO()
    if max(image.size) > JPEG_ABOVE:
        image.save(file, "JPEG", quality=JPEG_QUALITY)
        kind = "jpeg"
    else:
        image.save(file, "PNG")
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


class EndpointJudge:
    """Asks one model at one endpoint in one form.

    Args:
        extra: fields merged into every request; null removes a field.
        cache: earlier answers, or None.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        form: Form,
        *,
        extra: Mapping[str, Any],
        concurrency: int,
        cache: AnswerCache | None,
    ):
        self.endpoint, self.model, self.form = endpoint, model, form
        self.extra, self.concurrency, self.cache = extra, concurrency, cache
        self.repeats = 0
        self._lock = threading.Lock()

    def read(
        self, pictures: Sequence[Image], asked: Sequence[tuple[int, Question]], *, remember: bool
    ) -> list[Reading]:
        """A reading for each (number of a picture, question). Equal requests are sent once.

        Args:
            remember: use the cache.
        """
        urls = [data_url(picture) for picture in pictures]
        cache = self.cache if remember else None
        bodies = [request(self.model, urls[k], question, self.form, self.extra) for k, question in asked]
        keys = [key_of(url=self.endpoint.url, body=body) for body in bodies]
        unique = dict(zip(keys, bodies, strict=True))
        self.repeats += len(keys) - len(unique)

        def one(key: str) -> Reading:
            known = None if cache is None else self._known(cache, key)
            if known is not None:
                return known
            try:
                answer = self.endpoint.ask(unique[key])
            except UnansweredError as error:
                return no_opinion(str(error))
            reading = replace(self.form.read(answer), call=answer.call)
            if cache is not None and not reading.why:
                cache.put(key, answer.as_json())
            return reading

        found = dict(zip(unique, in_parallel(one, list(unique), self.concurrency), strict=True))
        return [found[key] for key in keys]

    def figures(self) -> dict[str, float]:
        hits = 0 if self.cache is None else self.cache.hits
        return {**self.endpoint.figures(), "cache_hits": hits, "repeats": self.repeats}

    def close(self) -> None:
        self.endpoint.close()
        if self.cache is not None:
            self.cache.close()

    def _known(self, cache: AnswerCache, key: str) -> Reading | None:
        row = cache.get(key)
        if row is None:
            return None
        try:
            reading = self.form.read(Answer.from_json(row))
        except (ValueError, KeyError, TypeError):
            return None
        if reading.why:
            return None
        with self._lock:
            cache.hits += 1
        return replace(reading, call={"tries": 0})


def request(model: str, picture: str, question: Question, form: Form, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The body of one chat completion: one message, because not every template has a system message."""
    content = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": fenced(question, form.tail)},
    ]
    body = {"model": model, "messages": [{"role": "user", "content": content}], **form.fields(), **extra}
    return {name: value for name, value in body.items() if value is not None}


def find_model(endpoint: Endpoint, model: str | None) -> str:
    """The named model, or the server's only one."""
    try:
        served = endpoint.models()
    except UnansweredError as error:
        raise RewardError(f"judge {endpoint.url} does not answer: {error}; start it, or check @url") from None
    except StatusError as error:
        if model is None or error.status in (401, 403):
            raise
        return model  # not every server lists its models
    if model is not None:
        return model
    if len(served) != 1:
        raise RewardError(
            f"judge {endpoint.url} serves {len(served)} models: {', '.join(sorted(served)[:8])}; choose with @model"
        )
    return served[0]


def find_form(
    endpoint: Endpoint, model: str, mode: str, axes: Mapping[str, float], extra: Mapping[str, Any]
) -> tuple[Form, str]:
    """The first way of answering that works, and why those before it do not."""
    rubric = Rubric(axes)
    forms: dict[str, tuple[Form, ...]] = {
        "auto": (YesNoOdds(), rubric, Rating()),
        "yes_no": (YesNoOdds(),),
        "rubric": (rubric,),
        "checklist": (YesNoOdds(), YesNoWord()),
        "text": (Rating(),),
    }
    picture, failed = data_url(_probe_picture()), []
    for form in forms[mode]:
        body = request(model, picture, Question("a red square"), form, extra)
        try:
            reading = form.read(endpoint.ask(body))
        except StatusError as error:
            if error.status not in (400, 422):
                raise
            failed.append(f"{form.name}: {error}")
        except UnansweredError as error:  # a busy judge must not get another mode for the whole run
            raise RewardError(
                f"judge {endpoint.url} ({model}) does not answer: {error}; start again when it does, or set a "
                "larger @deadline_s or @attempts"
            ) from error
        else:
            if not reading.why:
                return form, "; ".join(failed)
            failed.append(f"{form.name}: {reading.why}")
    remedy = "turn a model's thinking off with @body" if mode == "auto" else "try @mode=auto"
    raise RewardError(f"judge {endpoint.url} ({model}) cannot be used with @mode={mode}: {'; '.join(failed)}; {remedy}")


def _probe_picture() -> Image:
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (96, 96), (140, 140, 140))
    ImageDraw.Draw(picture).rectangle((32, 32, 63, 63), fill=(214, 39, 40))
    return picture
