"""Pydantic AI's agents over chat completions."""

import json
import sys
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

asked = json.load(sys.stdin)
provider = OpenAIProvider(base_url=f"{asked['url']}/v1", api_key=asked["key"])
model = OpenAIChatModel(asked["chat"], provider=provider)
said = asked["hello"][0]["content"]


class Answer(BaseModel):
    color: Literal["red", "green"]


def run(output_type=str):
    agent = Agent(model, output_type=output_type, model_settings={"temperature": 0}, retries=0)
    return agent.run_sync(said).output


def pieces():
    agent = Agent(model, model_settings={"temperature": 0})
    with agent.run_stream_sync(said) as result:
        return list(result.stream_text(delta=True, debounce_by=None))


print(
    json.dumps(
        {
            "hello": run(),
            "pieces": pieces(),
            "structured": run(NativeOutput(Answer)).model_dump(),
            "structured_by_call": run(ToolOutput(Answer)).model_dump(),
        }
    )
)
