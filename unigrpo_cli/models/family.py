"""Model families: which one a model directory belongs to, and what it says of the model before loading it.

A family enters by an entry point of group `unigrpo.models` (name = family, value = `module:object`) or by the hook
`unigrpo_register_models`; ours is an entry point like any other. Importing a family must not import torch: `inspect`
and the dry run read headers only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from unigrpo_cli.errors import NotFetchedError, UsageError, WeightsError, suggest
from unigrpo_cli.io.entry_points import OURS, distribution, installed
from unigrpo_cli.models.files import refuse_odd_files
from unigrpo_cli.models.hub import locate

if TYPE_CHECKING:
    import torch

    from unigrpo_cli.models.policy import TrainablePolicy

GROUP = "unigrpo.models"
BUILT_IN = (
    EntryPoint("mot", "unigrpo_cli.models.mot.family:MoTFamily", GROUP),
    EntryPoint("pair", "unigrpo_cli.models.pair.family:PairFamily", GROUP),
)


@dataclass(frozen=True)
class Audit:
    """What the headers of a model say.

    Args:
        facts: as JSON, for `inspect --json`.
        lines: the same for people.
        problems: one line each; empty when the model can be loaded.
        sizes: as `ModelFamily.sizes`.
    """

    facts: dict[str, Any]
    lines: Sequence[str]
    problems: Sequence[str]
    sizes: Any = None


class ModelFamily(Protocol):
    """Models of one form. `weights_file` names the network's file where a directory holds several.

    `sizes` and `published` are the inputs of the memory plan (`run/memory`): of a local model, and of a model on the
    hub that is not downloaded. None: the family has no memory plan. Training and saving belong to the policy
    (`models.policy.TrainablePolicy`).
    """

    name: str
    hub_files: tuple[str, ...]
    """Patterns of the files that are fetched of a model on the hub."""

    def reject(self, directory: Path) -> str | None:
        """Why a directory is not of this family; None when it is, whole or damaged."""
        ...

    def load(
        self,
        directory: Path,
        weights_file: str | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
        vae_tile_rows: int,
        **options: Any,
    ) -> TrainablePolicy:
        """The policy, its weights frozen. Raises WeightsError for files that are missing, damaged or unfit.

        Args:
            options: nothing, or `options`, an instance of the family's `Options` (a pydantic model) where it has one:
                the settings `model_options.KEY`.
        """
        ...

    def audit(self, directory: Path, weights_file: str | None) -> Audit: ...

    def digest(self, directory: Path, weights_file: str | None) -> str:
        """A digest that tells these weights from others at little cost."""
        ...

    def sizes(self, directory: Path, weights_file: str | None, **options: Any) -> Any:
        """Sizes of a model with the options of `load`."""
        ...

    def published(self, model: str) -> Any: ...

    def defaults(self, sizes: Any) -> dict[str, Any]:
        """`preset`, and settings on top of it (`dtype`, `sampling`); with None those of the usual model."""
        ...


class Found(NamedTuple):
    """A model that is here, and its family."""

    family: ModelFamily
    directory: Path
    weights_file: str | None


@dataclass
class ModelRegistry:
    """All known families. Entry points are imported when the first model is looked for."""

    _families: dict[str, ModelFamily] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    _loaded: bool = False

    def add(self, family: ModelFamily) -> None:
        """Add a family; for `unigrpo_register_models`.

        Raises:
            UsageError: when another family has its name.
        """
        other = self._families.get(family.name)
        if other is not None and _origin(other) != _origin(family):
            raise UsageError(f"two model families are named {family.name!r}; rename or uninstall one")
        self._families[family.name] = family

    def families(self) -> list[ModelFamily]:
        if not self._loaded:
            self._loaded = True
            points = list(installed(GROUP))
            ours = {point.name for point in points if distribution(point)[0] == OURS}
            points += [point for point in BUILT_IN if point.name not in ours]  # run from a checkout, not installed
            for point in points:
                try:
                    self.add(point.load()())
                except (Exception, SystemExit) as error:  # a broken plugin must not break other families
                    self.broken[point.name] = f"{distribution(point)[0]} failed: {type(error).__name__}: {error}"
        return list(self._families.values())

    def find(self, model: str, fetch: bool = True) -> Found:
        """A model by `embedded`, path or hub id, and the family that recognises it.

        Raises:
            WeightsError: when there is no such model or no family recognises it; NotFetchedError without `fetch`, for
                a model of the hub that is not on this machine.
        """
        patterns = [pattern for family in self.families() for pattern in family.hub_files]
        directory, weights_file = locate(model, patterns, fetch)
        if is_adapter(directory):
            raise WeightsError(f"{directory} is an adapter: give its base with --model, and it with --adapter")
        refuse_odd_files(directory)
        reasons = dict(self.broken)
        for family in self.families():
            reason = family.reject(directory)
            if reason is None:
                return Found(family, directory, weights_file)
            reasons[family.name] = reason
        known = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "none is installed"
        raise WeightsError(f"{directory} is a model of no known family ({known})")

    def sizes(
        self, model: str, weights_file: str | None = None, fetch: bool = True, given: Mapping[str, Any] | None = None
    ) -> tuple[ModelFamily, Any, bool]:
        """Family and sizes of a model, and whether they are only the published ones of a model that is not here.

        Args:
            given: `model_options`.

        Raises:
            WeightsError: as `find`, and when the model's files are damaged.
            UsageError: as `family_options`.
        """
        try:
            found = self.find(model, fetch)
        except NotFetchedError:
            for family in self.families():
                if (sizes := family.published(model)) is not None:
                    family_options(family, given or {})
                    return family, sizes, True
            raise
        options = family_options(found.family, given or {})
        return found.family, found.family.sizes(found.directory, weights_file or found.weights_file, **options), False


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds adapters: of one network, or of several in folders of their own."""
    if (directory / "adapter_config.json").is_file():
        return not (directory / "config.json").is_file()
    return any(directory.glob("*/adapter_config.json")) and not (directory / "model_index.json").is_file()


def family_options(family: ModelFamily, given: Mapping[str, Any]) -> dict[str, Any]:
    """The argument `options` of `ModelFamily.load`, for a family that has any.

    Raises:
        UsageError: when one is unknown or of the wrong kind.
    """
    kind = getattr(family, "Options", None)
    if kind is None:
        if given:
            raise UsageError(f"model_options: models of family {family.name} have none; leave it out")
        return {}
    from pydantic import ValidationError

    try:
        return {"options": kind.model_validate(dict(given))}
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        hint = suggest(key, kind.model_fields) if first["type"] == "extra_forbidden" else first["msg"]
        raise UsageError(f"model_options.{key} = {first['input']!r}: {hint}") from error


def _origin(family: ModelFamily) -> str:
    """Where a family is defined: a plugin file that is loaded twice is one family."""
    return f"{type(family).__module__}.{type(family).__qualname__}"


MODELS = ModelRegistry()
"""The families of this process."""
