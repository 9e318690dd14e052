"""What all request schemas share."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class RequestModel(BaseModel):
    """A body whose unknown fields are errors. A field that is null counts as left out.

    Types are strict, as those of OpenAI's servers are: "5" is no number, nor is true, and 1 is no boolean. A whole
    number will do where any number is meant.

    Fields that OpenAI or vLLM define and this server does not offer are listed in `_unsupported`, each with the values
    that ask for nothing.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    @classmethod
    def unsupported(cls) -> Mapping[str, tuple[Any, ...]]:
        """Fields that are known and not offered: values of them that change nothing, and may be sent."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known = {field.alias or name for name, field in cls.model_fields.items()}
        kept = {name: value for name, value in given.items() if value is not None or name not in known}
        for name, harmless in cls.unsupported().items():
            if name not in kept:
                continue
            value = kept.pop(name)
            if value is not None and not any(_is_equal(value, one) for one in harmless):
                raise PydanticCustomError(
                    "unsupported", "'{name}' is not supported by this server; leave it out", {"name": name}
                )
        # One is enough to refuse the body, and errors cost more than what they are about.
        for name in [name for name in kept if name not in known][1:]:
            del kept[name]
        return kept


def _is_equal(value: Any, known: Any) -> bool:
    """To Python, True is 1 and False is 0."""
    return value == known and isinstance(value, bool) == isinstance(known, bool)
