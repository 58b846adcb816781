"""Fields of requests, and those of OpenAI's API that are refused: nothing is ignored that would change the answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ApiError, bad, short
from .sampling import Sampling

# field: (what it may be without effect, why it may not be anything else)
_ENGINE = "transformers' continuous batching has no"
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "one answer a request; send several requests"),
    "best_of": ((1,), "one answer a request"),
    "echo": ((False,), "the prompt is not given back"),
    "suffix": (("",), "the model does not fill in"),
    "presence_penalty": ((0,), f"{_ENGINE} penalties for each request"),
    "frequency_penalty": ((0,), f"{_ENGINE} penalties for each request"),
    "logit_bias": (({},), f"{_ENGINE} biases for each request"),
    "top_logprobs": ((0,), f"{_ENGINE} probabilities of other tokens than the chosen one"),
    "tools": (([],), "no tools"),
    "tool_choice": (("none", "auto"), "no tools"),
    "functions": (([],), "no functions"),
    "response_format": (({"type": "text"},), "text alone; the engine has no constrained decoding"),
    "modalities": ((["text"],), "text alone"),
}
# Fields that change no answer.
_WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
                   "parallel_tool_calls")  # fmt: skip


Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]  # a body has room for a million errors, which would take gigabytes


Stop = Annotated[str, Field(max_length=1000)]  # an answer is searched for each, with every token


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class Asked(BaseModel):
    """Fields that completions and chat completions have in common."""

    model_config = ConfigDict(extra="forbid", strict=False)

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None

    def sampling(self) -> Sampling:
        """OpenAI's defaults: temperature 1, top_p 1."""
        return Sampling(
            1.0 if self.temperature is None else self.temperature, 1.0 if self.top_p is None else self.top_p, self.seed
        )

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def wants_logprobs(self) -> bool:
        raise NotImplementedError

    def take_prompt(self) -> Any:
        """The text, tokens or messages to answer. They are no longer here then: nobody needs them while it runs."""
        raise NotImplementedError

    def most(self) -> int | None:
        """Tokens of the answer; None for as many as there is room for."""
        return self.max_tokens


class Completion(Asked):
    """POST /v1/completions."""

    prompt: str | Items[str] | Items[int] | Items[Items[int]]
    logprobs: Literal[0] | bool | None = None

    def wants_logprobs(self) -> bool:
        return self.logprobs is not None and self.logprobs is not False

    def most(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's

    def take_prompt(self) -> str | list[int]:
        prompt, self.prompt = self.prompt, ""
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            return prompt[0]
        if isinstance(prompt, str) or all(isinstance(token, int) for token in prompt):
            return prompt  # type: ignore[return-value]
        raise bad(f"prompt: one a request, got {len(prompt)}; send several requests", "prompt")


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Items[Part]
    name: Annotated[str, Field(max_length=256)] | None = None

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class Chat(Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[Items[Message], Field(min_length=1)]
    logprobs: bool | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)

    def take_prompt(self) -> list[dict[str, str]]:
        messages, self.messages = self.messages, []
        return [message.plain() for message in messages]

    def most(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class LoadAdapter(BaseModel):
    """POST /v1/load_lora_adapter, as vLLM has it."""

    model_config = ConfigDict(extra="forbid")
    lora_name: Annotated[str, Field(min_length=1)]
    lora_path: Annotated[str, Field(min_length=1)]


class UnloadAdapter(BaseModel):
    """POST /v1/unload_lora_adapter, as vLLM has it."""

    model_config = ConfigDict(extra="forbid")
    lora_name: Annotated[str, Field(min_length=1)]
    lora_int_id: int | None = None


def parse(request: type[BaseModel], content: object) -> Any:
    """A request of that class. Raises ApiError 400, which names the field."""
    if not isinstance(content, dict):
        raise bad(f"the body must be a JSON object, got {type(content).__name__}")
    fields = dict(content)
    if issubclass(request, Asked):
        for name, (neutral, why) in _REFUSED.items():
            value = fields.pop(name, None)
            if value is not None and not any(value == plain for plain in neutral):
                raise bad(f"{name}={short(value)} is not supported: {why}", name, "unsupported_parameter")
        for name in _WITHOUT_EFFECT:
            fields.pop(name, None)
        if request is Completion and type(fields.get("logprobs")) is int and fields["logprobs"] > 0:
            why = _REFUSED["top_logprobs"][1]
            text = f"logprobs={fields['logprobs']} is not supported: {why}; logprobs=0 gives those of the chosen tokens"
            raise bad(text, "logprobs", "unsupported_parameter")
    try:
        return request.model_validate(fields)
    except ValidationError as error:
        raise _explained(error) from None


def _explained(error: ValidationError) -> ApiError:
    found = error.errors(include_url=False, include_context=False)
    # of a field with several types, what is wrong within the one that it has, rather than that it is not the first
    first = next((each for each in found if not each["type"].endswith("_type")), found[0])
    where = [str(part) for part in first["loc"]]
    name = where[0] if where else None
    if first["type"] == "extra_forbidden":
        return bad(f"{'.'.join(where)}: this server knows no such field", name, "unknown_parameter")
    return bad(f"{'.'.join(where) or 'body'}: {first['msg']}", name, "invalid_value")
