"""What turns text into tokens and back: a tokenizer and a chat template. Knows no engine and no adapters."""

from dataclasses import dataclass
from typing import Any

from engine.protocol import ModelFacts
from gateway.chat_template import ChatTemplate, ChatTemplateError, is_about_tools
from gateway.errors import InvalidRequestError
from gateway.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ModelText:
    """Of one base model, or of an adapter that brought its own."""

    facts: ModelFacts
    tokenizer: Tokenizer
    template: ChatTemplate | None
    config: dict[str, Any]
    """The base's tokenizer_config.json."""

    async def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        prompt_end: str = "",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        variables: dict[str, Any] | None = None,
    ) -> list[int]:
        """The prompt of a chat, as transformers' `apply_chat_template` gives it, with `prompt_end` behind it.

        Raises:
            InvalidRequestError: the model has no chat template, or it refuses the messages.
        """
        if self.template is None:
            raise InvalidRequestError(
                f"{self.facts.name} has no chat template; use /v1/completions.", param="messages"
            )
        if not self.template.knows_tools and any(map(is_about_tools, messages)):
            raise InvalidRequestError(
                f"The chat template of {self.facts.name} knows no tools, so calls and their results cannot be shown "
                "to this model.",
                param="messages",
            )
        try:
            prompt = self.template.render(
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=variables,
            )
        except ChatTemplateError as error:
            raise InvalidRequestError(str(error), param="messages") from error
        return await self.tokenizer.encode(prompt + prompt_end, add_special_tokens=add_special_tokens)
