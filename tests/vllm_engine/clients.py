"""LangChain's and LlamaIndex's clients, in the environment that has them: asks a server the questions on standard
input, and prints what each client was told, whole and in pieces.
"""

import json
import sys

from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

asked = json.load(sys.stdin)
told = {}
for model in asked["models"]:
    of = {"base_url": asked["url"], "model": model, "temperature": 0}
    chain = ChatOpenAI(api_key="none", **of)
    index = OpenAILike(
        model=model, api_base=asked["url"], api_key="none", temperature=0, is_chat_model=True, context_window=1024
    )
    for question in asked["questions"]:
        messages = [ChatMessage(role="user", content=question)]
        told[f"{model} {question}"] = [
            chain.invoke(question).content,
            "".join(piece.content for piece in chain.stream(question)),
            index.chat(messages).message.content,
            "".join(piece.delta or "" for piece in index.stream_chat(messages)),
        ]
json.dump(told, sys.stdout)
