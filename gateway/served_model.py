"""One base model as the gateway sees it: its text side, its adapters, its engine; and all of them by name."""

import asyncio
import time
from typing import Any

import aiohttp
import msgspec

from engine.protocol import AdapterPart, AdapterRef, ModelFacts
from gateway.adapter_list import AdapterList, ModelAdapters
from gateway.adapter_text import AdapterTexts
from gateway.catalog import Catalog, ListedAdapter
from gateway.chat_template import ChatTemplateError, read_chat_template
from gateway.config import GatewayConfig, ModelConfig
from gateway.engine_client import RETRY_AFTER_S, EngineClient, EngineFilesError
from gateway.errors import InvalidRequestError, ModelNotFoundError, UnavailableError
from gateway.model_text import ModelText
from gateway.openai_schema import Model, WeightedAdapter
from gateway.runtime_adapters import RuntimeAdapter, RuntimeAdapters
from gateway.tokenizer import Tokenizer, TokenizerError
from gateway.tool_calls import ToolFormat


class ServedModel:
    """One base model and its adapters."""

    def __init__(self, model: ModelConfig, session: aiohttp.ClientSession, request_timeout_s: float) -> None:
        self.name = model.name
        self.catalog = Catalog(model)
        self.tool_format: ToolFormat | None = None if model.tool_format == "auto" else model.tool_format
        """How it writes function calls, where its operator says so."""
        self.client = EngineClient(model.engine, session, self._read_files, request_timeout_s)
        self._adapter_texts = AdapterTexts(self.client.adapter_files)
        self._text: ModelText | None = None
        self._started = int(time.time())

    async def text_for(self, adapter: AdapterRef | None) -> ModelText:
        """The text side of the base, or of an adapter that brought its own. Raises `GatewayError`."""
        return await self._adapter_texts.text_of(adapter, self.text)

    @property
    def text(self) -> ModelText:
        """Raises `UnavailableError` until the engine was reached once."""
        if self._text is None:
            raise UnavailableError(
                f"The engine of {self.name!r} is not ready yet.", retry_after_s=RETRY_AFTER_S
            )
        return self._text

    def merged(self, model_id: str, adapters: list[WeightedAdapter]) -> AdapterRef:
        """The weighted sum of adapters of this base.

        Raises:
            InvalidRequestError: `model_id` is not the base itself.
            ModelNotFoundError: there is no such adapter.
        """
        if model_id != self.name:
            raise InvalidRequestError(
                f"'adapters' are merged on a base: give 'model' as '{self.name}' and name every adapter in 'adapters'.",
                param="model",
            )
        parts: list[AdapterPart] = []
        for index, adapter in enumerate(adapters):
            ref = self.catalog.find(adapter.name.removeprefix(f"{self.name}/"))
            if ref is None:
                raise unknown_model(adapter.name, f"adapters[{index}].name")
            parts.append(AdapterPart(ref, adapter.weight))
        tasks = "+".join(f"{part.weight:g}*{part.ref.name.rpartition('/')[2]}" for part in parts)
        return AdapterRef(name=f"{self.name}/{tasks}", uri="", parts=tuple(parts))

    async def adapters(self) -> ModelAdapters:
        """What its engine knows of its adapters, and those it does not know."""
        listed = await asyncio.to_thread(self.catalog.listed)
        try:
            report = await self.client.adapters()
        except UnavailableError:
            report = None
        known = {adapter.name for adapter in report.adapters} if report else set()
        names = (f"{self.name}/{adapter.task}" for adapter in listed)
        return ModelAdapters(self.name, report, [name for name in names if name not in known])

    def card(self) -> Model:
        return Model(
            id=self.name,
            created=self._started,
            root=self.name,
            parent=None,
            max_model_len=self._max_model_len,
        )

    def adapter_card(self, adapter: ListedAdapter) -> Model:
        return Model(
            id=f"{self.name}/{adapter.task}",
            created=adapter.created,
            root=self.name,
            parent=self.name,
            max_model_len=self._max_model_len,
        )

    @property
    def _max_model_len(self) -> int | None:
        return self._text.facts.max_model_len if self._text else None

    def _read_files(self, facts: ModelFacts, files: dict[str, bytes]) -> None:
        try:
            tokenizer = Tokenizer(files["tokenizer.json"])
            template = read_chat_template(files["tokenizer_config.json"])
            config = msgspec.json.decode(files["tokenizer_config.json"], type=dict[str, Any])
        except KeyError as error:
            raise EngineFilesError(f"The engine offers no {error.args[0]}.") from error
        except (TokenizerError, ChatTemplateError) as error:
            raise EngineFilesError(str(error)) from error
        self._text = ModelText(facts, tokenizer, template, config)


class ServedModels:
    """Every model of the gateway by its public name."""

    def __init__(self, config: GatewayConfig, session: aiohttp.ClientSession) -> None:
        self._models = {
            model.name: ServedModel(model, session, config.request_timeout_s) for model in config.models
        }
        self.runtime = RuntimeAdapters() if config.runtime_adapters else None
        """Of all bases; None where requests may add none."""

    def __iter__(self):
        return iter(self._models.values())

    @property
    def first(self) -> ServedModel:
        """Whom a request means that names no model. Raises `ModelNotFoundError` where there are only upstreams."""
        for model in self:
            return model
        raise ModelNotFoundError("No engine of ours is behind this address.", param="model")

    def find(self, model_id: str, param: str = "model") -> tuple[ServedModel, AdapterRef | None]:
        """The base that `model_id` names, and the adapter on it if it names one.

        Raises:
            ModelNotFoundError: there is neither.
        """
        if (model := self._models.get(model_id)) is not None:
            return model, None
        if self.runtime is not None and (added := self.runtime.find(model_id)) is not None:
            return self._models[added.base], added.ref
        base, _, task = model_id.rpartition("/")
        model = self._models.get(base)
        adapter = model.catalog.find(task) if model else None
        if model is None or adapter is None:
            raise unknown_model(model_id, param)
        return model, adapter

    def knows(self, model_id: str) -> bool:
        """Whether `model_id` is taken. Costs a `stat` or two."""
        try:
            self.find(model_id)
        except ModelNotFoundError:
            return False
        return True

    def cards(self) -> list[Model]:
        """All bases and all adapters that can be listed. Reads directories."""
        configured = [
            card
            for model in self
            for card in [model.card(), *(model.adapter_card(adapter) for adapter in model.catalog.listed())]
        ]
        return configured + [self._runtime_card(added) for added in self.runtime or ()]

    async def adapters(self) -> AdapterList:
        """Asks every engine at once; one that is down takes nothing from the others."""
        return AdapterList(list(await asyncio.gather(*(model.adapters() for model in self))))

    def find_card(self, model_id: str) -> Model:
        """Raises `ModelNotFoundError`. Reads directories."""
        model, adapter = self.find(model_id)
        if adapter is None:
            return model.card()
        if self.runtime is not None and (added := self.runtime.find(model_id)) is not None:
            return self._runtime_card(added)
        for listed in model.catalog.listed():
            if adapter.name == f"{model.name}/{listed.task}":
                return model.adapter_card(listed)
        raise unknown_model(model_id)

    def _runtime_card(self, added: RuntimeAdapter) -> Model:
        """Under the name it was given. Where it lies is not for everybody to know: its root is its base."""
        listed = ListedAdapter(added.name, added.created)
        return msgspec.structs.replace(self._models[added.base].adapter_card(listed), id=added.name)


def unknown_model(model_id: str, param: str = "model") -> ModelNotFoundError:
    name = model_id.encode(errors="replace").decode()[:200]
    return ModelNotFoundError(
        f"The model '{name}' does not exist. GET /v1/models lists the models there are.", param=param
    )
