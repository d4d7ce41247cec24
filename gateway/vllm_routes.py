"""Addresses for people who come from vLLM: adapters loaded and unloaded by request. Knows no generation."""

import uuid

from litestar import Request, post
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp

from engine.protocol import AdapterRef, Generate, SamplingParams
from gateway.errors import GatewayError, InvalidRequestError, ModelNotFoundError
from gateway.openai_request import decode
from gateway.openai_schema import LoadAdapterFields, UnloadAdapterFields
from gateway.routes import models_of
from gateway.runtime_adapters import RuntimeAdapters, reference
from gateway.served_model import ServedModel

MAX_NAME_CHARACTERS = 200


class LoraError(GatewayError):
    """In vLLM's words."""

    def __init__(self, message: str, param: str, *, found: bool = True) -> None:
        super().__init__(message, param=param)
        self.status = 400 if found else 404
        self.type = "InvalidUserInput" if found else "NotFoundError"


@post("/v1/load_lora_adapter", status_code=200)
async def load_lora_adapter(request: Request) -> ASGIApp:
    """Make an adapter servable as `model=<lora_name>`, once the engine has read it and found nothing wrong."""
    adapters = _runtime(request)
    fields = decode(await request.body(), LoadAdapterFields)
    name, path = fields.lora_name, fields.lora_path
    if not name or not path:
        raise LoraError(
            "Both 'lora_name' and 'lora_path' must be provided.", "lora_path" if name else "lora_name"
        )
    if len(name) > MAX_NAME_CHARACTERS or not name.isprintable() or not path.isprintable():
        raise LoraError("'lora_name' or 'lora_path' is too long or not printable.", "lora_name")
    models = models_of(request)
    model = models.first
    if fields.base_model_name is not None:
        model, adapter = models.find(fields.base_model_name, "base_model_name")
        if adapter is not None:
            raise LoraError("'base_model_name' must name a base model.", "base_model_name")
    if adapters.find(name) is None:
        taken = models.knows(name)
    else:
        taken = not fields.load_inplace
    if taken:
        raise LoraError(
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
            "set 'load_inplace' to True.",
            "lora_name",
        )
    ref = reference(name, model.name, path)
    try:
        await _try(model, ref)
    except ModelNotFoundError as error:
        raise LoraError(f"No adapter found for {path[:200]}", "lora_path", found=False) from error
    except InvalidRequestError as error:
        raise LoraError(error.message, "lora_path") from error
    adapters.add(name, model.name, ref)
    return _text(f"Success: LoRA adapter '{name}' added successfully.")


@post("/v1/unload_lora_adapter", status_code=200)
async def unload_lora_adapter(request: Request) -> ASGIApp:
    """Forget an adapter that was loaded by request. The engine drops it when nobody has used it for long enough."""
    adapters = _runtime(request)
    fields = decode(await request.body(), UnloadAdapterFields)
    if not fields.lora_name:
        raise LoraError("'lora_name' needs to be provided to unload a LoRA adapter.", "lora_name")
    if not adapters.remove(fields.lora_name):
        raise LoraError(
            f"The lora adapter '{fields.lora_name[:200]}' cannot be found.", "lora_name", found=False
        )
    return _text(f"Success: LoRA adapter '{fields.lora_name}' removed successfully.")


VLLM_ROUTES = [load_lora_adapter, unload_lora_adapter]


async def _try(model: ServedModel, adapter: AdapterRef) -> None:
    """One token with it: the engine fetches, checks and loads it. Raises `GatewayError`."""
    request = Generate(f"load-{uuid.uuid4().hex}", [0], SamplingParams(max_tokens=1), adapter)
    generation = model.client.generate([request])
    try:
        while await generation.next():
            pass
    finally:
        generation.close()


def _runtime(request: Request) -> RuntimeAdapters:
    runtime = models_of(request).runtime
    if runtime is None:
        error = InvalidRequestError(
            "Adapters are not loaded by request here: whoever runs this server can allow it with "
            "'runtime_adapters = true' under [gateway].",
            code="runtime_adapters_disabled",
        )
        error.status = 404
        raise error
    return runtime


def _text(text: str) -> ASGIApp:
    return ASGIResponse(body=text.encode(errors="replace"), media_type="text/plain; charset=utf-8")
