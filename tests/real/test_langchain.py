"""Real vLLM behind the proxy, seen through LangChain."""

import pytest
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field, SecretStr

from tests.serving import Server

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(120, func_only=True)]

QUESTION = "What is the capital of France?"


class Trip(BaseModel):
    """A trip to plan."""

    days: int = Field(ge=1, le=9)
    by_train: bool


@tool
def book(days: int, by_train: bool) -> str:
    """Book a trip of some days."""
    return f"booked {days} days, train: {by_train}"


@pytest.fixture
def chat(server: Server) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{server.base_url}/v1",
        api_key=SecretStr("none"),
        model="smollm2",
        temperature=0,
        max_completion_tokens=100,
        max_retries=0,
    )


def test_invoke_answers(chat: ChatOpenAI) -> None:
    answer = chat.invoke(QUESTION)
    assert "Paris" in str(answer.content)
    assert answer.usage_metadata
    assert answer.usage_metadata["output_tokens"] > 0


def test_stream_answers_in_pieces(chat: ChatOpenAI) -> None:
    pieces = [str(chunk.content) for chunk in chat.stream(QUESTION) if chunk.content]
    assert len(pieces) > 1
    assert "Paris" in "".join(pieces)


def test_batch_answers_every_question(chat: ChatOpenAI) -> None:
    answers = chat.batch([QUESTION, "What is the capital of Japan?"])
    assert "Paris" in str(answers[0].content)
    assert "Tokyo" in str(answers[1].content)


def test_a_bound_tool_is_called_with_arguments_that_it_takes(chat: ChatOpenAI) -> None:
    answer = chat.bind_tools([book], tool_choice="book", strict=True).invoke("Book me a trip of 3 days by train.")
    (call,) = answer.tool_calls
    assert call["name"] == "book"
    assert str(book.invoke(call["args"])).startswith("booked")


def test_structured_output_is_an_object_of_the_schema(chat: ChatOpenAI) -> None:
    trip = chat.with_structured_output(Trip, method="json_schema").invoke("Plan a trip of 3 days by train.")
    assert isinstance(trip, Trip)
    assert 1 <= trip.days <= 9
