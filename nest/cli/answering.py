"""Who answers in an evaluation: a model in this process, or one behind a server."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from nest.cli.options import Loading, Putting
from nest.cli.session import Session
from nest.errors import InputError
from nest.settings import settings

if TYPE_CHECKING:
    from nest.generation.engine import Engine, Which


IN_FLIGHT, TIMEOUT_SECONDS = 16, 120.0


@settings("options of the engine")
class Answering:
    """How answers are made.

    Attributes:
        engine: static batches, the paged continuous batching of transformers, auto, which takes the
            latter where it pays; server, or vllm in this process.
        server: Address of an OpenAI-compatible server (vLLM, SGLang, llama.cpp), such as
            http://localhost:8000/v1; --model is then the name that it serves, and its key is taken from
            OPENAI_API_KEY.
        in_flight: Most requests to a server at once; 16 if unset.
        timeout_seconds: For one attempt at a request to a server; 120 if unset.
    """

    engine: Literal["auto", "static", "paged", "server", "vllm"] = "auto"
    server: str | None = None
    in_flight: Annotated[int, Field(ge=1, le=1024)] | None = None
    timeout_seconds: Annotated[float, Field(gt=0)] | None = None

    @property
    def has_own_model(self) -> bool:
        """Whether the answers are of a model that is not loaded here by us."""
        return self.server is not None or self.engine in ("server", "vllm")

    def made(self, model: str, loading: Loading, putting: Putting, run: Session) -> Which | Engine:
        """The name of an engine for a model in this process, or an engine that has its own.

        Raises:
            InputError: options that do not go together, or that would have no effect.
            EngineError: the server is not there, or does not serve the model.
        """
        if self.server is not None and self.engine not in ("auto", "server"):
            raise InputError(
                f"--engine {self.engine} and --server {self.server} are two engines; give one of them"
            )
        if self.engine == "server" and self.server is None:
            raise InputError("--engine server needs its address: --server http://localhost:8000/v1")
        if self.server is None:
            given = [name for name in ("in_flight", "timeout_seconds") if getattr(self, name)]
            if given:
                flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
                raise InputError(f"{flags} has no effect without --server; leave it out")
            if self.engine in ("auto", "static", "paged"):
                return self.engine
        if self.server is not None:
            _refuse(loading, "dtype", "device", "device_map", "revision", "trust_remote_code")
            from nest.generation.server import ServerEngine

            found = ServerEngine(
                self.server,
                model,
                in_flight=self.in_flight or IN_FLIGHT,
                timeout_seconds=self.timeout_seconds or TIMEOUT_SECONDS,
                template_kwargs=putting.switches(),
                system=putting.system,
                progress=run.progress,
            )
            found.check()
            return found
        _refuse(loading, "device", "device_map", "trust_remote_code")
        from nest.generation.vllm import VllmEngine

        return VllmEngine(
            model,
            revision=loading.revision,
            dtype=loading.dtype,
            template_kwargs=putting.switches(),
            system=putting.system,
            progress=run.progress,
        )


ANSWERING = Answering()


def _refuse(loading: Loading, *names: str) -> None:
    """Options of loading that the engine does not take.

    Raises:
        InputError: one of them was given.
    """
    given = [
        f"--{field.name.replace('_', '-')}"
        for field in fields(Loading)
        if field.name in names and getattr(loading, field.name) != field.default
    ]
    if given:
        raise InputError(f"{', '.join(given)} has no effect with this engine; leave it out")
