"""How prompts are put: the system prompt, the template and its switches; recorded, and compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompting:
    """What decides how a prompt is rendered, besides the prompt.

    Attributes:
        system: System prompt put before conversations that have none of their own.
        template_kwargs: Switches of the chat template, such as `enable_thinking`.
        template_sha256: Hash of the template's text; None where there is none.
    """

    system: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    template_sha256: str | None = None

    @staticmethod
    def of(
        tokenizer: Any, system: str | None, template_kwargs: Mapping[str, Any] | None
    ) -> Prompting:
        """Of a tokenizer, or of None where prompts are encoded by other means."""
        template = getattr(tokenizer, "chat_template", None)
        text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
        sha256 = hashlib.sha256(text.encode()).hexdigest() if template else None
        return Prompting(system, dict(template_kwargs or {}), sha256)

    @staticmethod
    def recorded_in(provenance: Mapping[str, Any]) -> Prompting | None:
        """What an artifact says of itself; None where it was made before that was recorded."""
        found = provenance.get("prompting")
        if not isinstance(found, Mapping):
            # format 1.1 and before: the system prompt alone
            system = provenance.get("system")
            return Prompting(system) if isinstance(system, str) else None
        kwargs = found.get("template_kwargs")
        return Prompting(
            found.get("system"),
            dict(kwargs) if isinstance(kwargs, Mapping) else {},
            found.get("template_sha256"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return {
            "system": self.system,
            "template_kwargs": dict(self.template_kwargs),
            "template_sha256": self.template_sha256,
        }

    def differences(self, then: Prompting, what: str) -> list[str]:
        """A sentence for each thing that was another when an artifact was made.

        Args:
            then: How its prompts were put.
            what: Names the artifact, such as `the selection`.
        """
        said = [
            f"{what} was made with {name} {before!r}, and this run has {now!r}"
            for name, before, now in (
                ("the system prompt", then.system, self.system),
                ("the template's switches", dict(then.template_kwargs), dict(self.template_kwargs)),
            )
            if before != now
        ]
        known = then.template_sha256 is not None and self.template_sha256 is not None
        if known and then.template_sha256 != self.template_sha256:
            hashes = [str(sha256)[:12] for sha256 in (then.template_sha256, self.template_sha256)]
            said.append(
                f"{what} was made with the chat template {hashes[0]}, and this run has {hashes[1]} "
                "(sha256): the prompts are not put the same way"
            )
        return said
