"""Chats that are rendered by transformers and by us. Standard library only: the engines' interpreter reads it too."""

SYSTEM = {"role": "system", "content": 'You are a lawyer.\nAnswer briefly, "in Russian".'}
QUESTION = {"role": "user", "content": "Что такое <b>оферта</b> & акцепт?"}
ANSWER = {"role": "assistant", "content": "Предложение заключить договор."}
FOLLOW_UP = {"role": "user", "content": "例を一つ。 {{ bos_token }}"}
SPACED = {"role": "user", "content": "  two lines,\n\nspaces around  "}

CONVERSATIONS = {
    "one question": [QUESTION],
    "a system message": [SYSTEM, QUESTION],
    "two turns": [QUESTION, ANSWER, FOLLOW_UP],
    "two turns and a system message": [SYSTEM, QUESTION, ANSWER, FOLLOW_UP],
    "white space around": [SPACED, ANSWER, SPACED],
}
