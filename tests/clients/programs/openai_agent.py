"""OpenAI's agents: a tool that must be called, its result sent back, over Responses and over chat completions."""

import json
import sys

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)

asked = json.load(sys.stdin)
set_tracing_disabled(True)
client = openai.AsyncOpenAI(base_url=f"{asked['url']}/v1", api_key=asked["key"], max_retries=0)
calls = []


@function_tool
def get_time(zone: str) -> str:
    """The time in a zone."""
    calls.append(zone)
    return asked["result"]


def answer(kind):
    settings = ModelSettings(temperature=0, tool_choice="required", parallel_tool_calls=False)
    model = kind(model=asked["chat"], openai_client=client)
    agent = Agent(name="clock", model=model, tools=[get_time], model_settings=settings)
    return Runner.run_sync(agent, asked["hello"][0]["content"]).final_output


def hello(kind):
    agent = Agent(name="plain", model=kind(model=asked["chat"], openai_client=client))
    agent.model_settings = ModelSettings(temperature=0)
    return Runner.run_sync(agent, asked["hello"][0]["content"]).final_output


kinds = {"chat": OpenAIChatCompletionsModel, "responses": OpenAIResponsesModel}
print(
    json.dumps(
        {
            "hello": hello(OpenAIChatCompletionsModel),
            "by_responses": hello(OpenAIResponsesModel),
            **{f"agent_by_{name}": answer(kind) for name, kind in kinds.items()},
            "n_calls": len(calls),
        }
    )
)
