"""Scripted providers of four protocols for claude_code.py and cli_clients.py: each reads strictly, and says in its way
what it is told."""
from __future__ import annotations

import base64
import itertools
import json
import re
import time
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

ANTHROPIC_ONLY = {"cache_control", "context_management", "metadata", "defer_loading", "thinking", "signature", "betas",
                  "input_schema", "tool_use_id", "output_config", "is_error"}
numbers = itertools.count(1)


def expect(condition: Any, what: str, seen: Any = "") -> None:
    if not condition:
        raise AssertionError(f"{what}; seen: {str(seen)[-700:]}")


def sse(value: Any, kind: str = "") -> bytes:
    return f"event: {kind}\n".encode() * bool(kind) + b"data: " + json.dumps(value).encode() + b"\n\n"


def secret(name: str) -> str:
    """What only this provider can have made, in base64 that always begins alike."""
    return base64.b64encode(f"{name:_<9}{next(numbers):06}".encode()).decode()


def pieces(kind: str, value: Any) -> Iterator[str]:
    """A text, a call's arguments or a custom call's input, bit by bit; a text that says so never ends."""
    text = {"call": lambda: json.dumps(value[1]), "custom": lambda: value[1]}.get(kind, lambda: value)()
    yield from re.findall(r"(?s).{1,9}", text)
    while text == "endless":
        time.sleep(0.05)
        yield f" drop{next(numbers)}"


def counted(parts: List[Any]) -> Tuple[List[Any], int]:
    """An answer's parts, and the length of its prompt in tokens, which one of them may state."""
    return ([part for part in parts if part[0] != "tokens"],
            next((value for kind, value in parts if kind == "tokens"), 90))


def inner_parts(content: Any) -> List[Dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content or []


class Turn:
    """What all protocols have. Roles: system, user, assistant, tool."""

    def __init__(self, role: str) -> None:
        self.role, self.text = role, ""
        self.images: List[bytes] = []
        self.calls: Dict[str, str] = {}         # names by id
        self.results: Dict[str, str] = {}
        self.thoughts: List[str] = []           # each as `said_thought` has it

    def take(self, url: str) -> None:
        expect(url.startswith("data:image/png;base64,") and self.role in ("user", "tool"), "an image at its place", url)
        self.images.append(base64.b64decode(url.partition(",")[2], validate=True))


def turn_of(turns: List[Turn], role: str) -> Turn:
    """The last turn if it has this role, else a new one."""
    if not turns or turns[-1].role != role:
        turns.append(Turn(role))
    return turns[-1]


class Wire:
    """A provider's protocol."""

    def __init__(self) -> None:
        self.thoughts: List[str] = []           # all that it has ever thought

    def said_thought(self, text: str, seal: str) -> str:
        """One that was said, of what has to come back: its text unless that is for show, and its seal."""
        self.thoughts.append(f"{text}|{seal}")
        return seal


class Chat(Wire):
    name, api, base, path = "chat", "openai-completions", "/v1", "/v1/chat/completions"
    model = {"id": "m1", "compat": {"requiresReasoningContentOnAssistantMessages": True}}
    fields = ("model messages stream stream_options max_tokens max_completion_tokens tools tool_choice user "
              "parallel_tool_calls reasoning_effort verbosity response_format prompt_cache_key temperature top_p")
    overflow = {"message": "This model's maximum context length is 128000 tokens. However, your messages resulted in "
                           "141234 tokens.", "type": "invalid_request_error", "code": "context_length_exceeded"}

    def read(self, body: Dict[str, Any]) -> Tuple[List[Turn], Dict[str, Any]]:
        turns = []
        for message in body["messages"]:
            turns.append(Turn(message["role"]))
            for part in inner_parts(message.get("content")):
                turns[-1].text += part.get("text", "")
                turns[-1].take(part["image_url"]["url"]) if part["type"] == "image_url" else None
            if message["role"] == "tool":
                expect(not turns[-1].images, "no image in a tool message")
                turns[-1].results[message["tool_call_id"]] = turns[-1].text
            turns[-1].thoughts = [f"{message['reasoning_content']}|"] if message.get("reasoning_content") else []
            for call in message.get("tool_calls", ()):
                turns[-1].calls[call["id"]] = call["function"]["name"] * bool(json.loads(call["function"]["arguments"]))
        return turns, {tool["function"]["name"]: tool["function"]["parameters"] for tool in body.get("tools", ())}

    def answer(self, parts: List[Any]) -> Iterator[bytes]:
        def chunk(delta: Dict[str, Any], finish: Optional[str] = None) -> bytes:
            return sse({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m1"}
        parts, tokens = counted(parts)
        calls = [part for part in parts if part[0] == "call"]
        for part in parts:
            kind, value = part
            place = {"index": calls.index(part)} if kind == "call" else {}
            if kind == "call":
                yield chunk({"tool_calls": [{**place, "id": f"call_{next(numbers)}", "type": "function",
                                             "function": {"name": value[0], "arguments": ""}}]})
            if kind == "think":
                self.said_thought(value, "")
            for piece in pieces(kind, value):
                yield chunk({"tool_calls": [{**place, "function": {"arguments": piece}}]} if kind == "call" else
                            {"content" if kind == "text" else "reasoning_content": piece})
        usage = {"prompt_tokens": tokens, "completion_tokens": 9, "total_tokens": tokens + 9}
        yield chunk({}, "tool_calls" if calls else "stop")
        yield sse({**head, "choices": [], "usage": usage}) + b"data: [DONE]\n\n"


def called_names(tools: Iterable[Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
    """Tools of the Responses API by the one name that each has elsewhere."""
    return {(f"{tool['name']}__" if inner is not tool else "") + inner.get("name", inner["type"]): inner
            for tool in tools for inner in tool.get("tools", [tool])}


class Responses(Wire):
    name, api, base, path, model = "responses", "openai-responses", "/v1", "/v1/responses", {"id": "m2"}
    fields = ("model input stream store include reasoning tools tool_choice parallel_tool_calls max_output_tokens user "
              "prompt_cache_key text client_metadata temperature top_p")
    overflow = {"message": "Your input exceeds the context window of this model. Please adjust your input and try "
                           "again.", "type": "invalid_request_error", "code": "context_length_exceeded"}

    def read(self, body: Dict[str, Any]) -> Tuple[List[Turn], Dict[str, Any]]:
        turns: List[Turn] = []
        tools, before = list(body.get("tools", ())), ""
        for item in body["input"]:
            kind = item.get("type", "message")
            tools += item.get("tools", ())
            if kind == "additional_tools":
                continue
            role = item.get("role") if kind == "message" else "tool" if kind.endswith("_output") else "assistant"
            expect(before != "reasoning" or role == "assistant", "reasoning has its item behind it", body["input"])
            turn, before = turn_of(turns, role), kind
            for part in inner_parts(item.get("content" if kind == "message" else "output")):
                turn.take(part["image_url"]) if "image_url" in part else None
            text = "".join(part.get("text", "") for part in inner_parts(item.get("content") or item.get("output")))
            turn.text += text if kind == "message" else ""
            if kind == "reasoning":
                summary = "".join(part["text"] for part in item["summary"])
                turn.thoughts.append(f"{summary}|{item['encrypted_content']}")
            turn.calls.update({item["call_id"]: item.get("name", kind)} if kind.endswith("_call") else {})
            text += " ".join(called_names(item.get("tools", ())))
            if role == "tool":
                turn.results[item["call_id"]] = turn.results.get(item["call_id"], "") + text
        return turns, {name: tool.get("parameters", {"type": "object"}) for name, tool in called_names(tools).items()}

    def answer(self, parts: List[Any]) -> Iterator[bytes]:
        def event(kind: str, **fields: Any) -> bytes:
            return sse({"type": "response." + kind, **fields}, "response." + kind)
        parts, tokens = counted(parts)
        yield event("created", response={"id": "resp_1", "status": "in_progress", "output": []})
        for index, (kind, value) in enumerate(parts):
            start, delta, end = {
                "think": ({"type": "reasoning", "summary": []}, "reasoning_summary_text", {
                    "summary": [{"type": "summary_text", "text": value}], "encrypted_content": kind == "think" and (
                        self.said_thought(value, secret(self.name)))}),
                "text": ({"type": "message", "role": "assistant", "content": []}, "output_text", {
                    "content": [{"type": "output_text", "text": value}]}),
                "call": ({"type": "function_call", "call_id": f"call_{next(numbers)}", "name": value[0],
                          "arguments": ""}, "function_call_arguments", {"arguments": json.dumps(value[1])}),
                "custom": ({"type": "custom_tool_call", "call_id": f"call_{next(numbers)}", "name": value[0],
                            "input": ""}, "custom_tool_call_input", {"input": value[1]})}[kind]
            item = {"id": f"fc_{next(numbers)}", **start}
            if item.get("name") == "tool_search":
                item.update(type="tool_search_call", execution="client", arguments={})
                del item["name"]
                yield event("output_item.done", output_index=index, item={**item, "arguments": value[1]})
                continue
            if "__" in item.get("name", ""):
                item["namespace"], _, item["name"] = item["name"].rpartition("__")
            yield event("output_item.added", output_index=index, item=item)
            for piece in pieces(kind, value):
                yield event(delta + ".delta", output_index=index, item_id=item["id"], delta=piece)
            yield event("output_item.done", output_index=index, item={**item, **end})
        yield event("completed", response={"id": "resp_1", "status": "completed", "output": [], "usage": {
            "input_tokens": tokens, "output_tokens": 9, "total_tokens": tokens + 9}})


class Gemini(Wire):
    name, api, base, model = "gemini", "google-generative-ai", "/v1beta", {"id": "gemini-3.1-pro-preview"}
    path, fields = f"/v1beta/models/{model['id']}:streamGenerateContent", (
        "contents systemInstruction tools toolConfig generationConfig")
    overflow = {"code": 400, "status": "INVALID_ARGUMENT",
                "message": "The input token count (1197000) exceeds the maximum number of tokens allowed (1048576)."}

    def read(self, body: Dict[str, Any]) -> Tuple[List[Turn], Dict[str, Any]]:
        turns: List[Turn] = []
        for content in body["contents"]:
            answers = [part["functionResponse"] for part in content["parts"] if "functionResponse" in part]
            role = "tool" if answers else {"user": "user", "model": "assistant"}[content["role"]]
            expect(not turns or turns[-1].role != role, "roles alternate", body["contents"])
            turn = turn_of(turns, role)
            for part in [*content["parts"], *(inner for answer in answers for inner in answer.get("parts", ()))]:
                turn.thoughts += [f"|{part['thoughtSignature']}"] if part.get("thoughtSignature") else []
                turn.text += "" if part.get("thought") else part.get("text", "")
                for call in [part["functionCall"]] if "functionCall" in part else []:
                    turn.calls[call["id"]] = call["name"]
                for media in [part["inlineData"]] if "inlineData" in part else []:
                    turn.take("data:{mimeType};base64,{data}".format(**media))
            for answer in answers:
                expect(answer["name"] == turns[-2].calls[answer["id"]], "a result names its call", answer)
                text = "".join(answer["response"].values())
                # Gemini CLI says all twice in a session that it has resumed, and what it says to Gemini passes as it is
                expect(turn.results.get(answer["id"], text) == text, "one result for a call", answer)
                turn.results[answer["id"]] = text
        declared = [tool for group in body.get("tools", ()) for tool in group["functionDeclarations"]]
        return turns, {tool["name"]: tool["parametersJsonSchema"] for tool in declared}

    def answer(self, parts: List[Any]) -> Iterator[bytes]:
        parts, tokens = counted(parts)
        seal = {"thoughtSignature": self.said_thought("", secret(self.name))}       # on the first call, else at the end
        for kind, value in parts:
            chunks = [{"functionCall": {"id": f"c{next(numbers)}", "name": value[0], "args": value[1]}, **seal}] \
                if kind == "call" else ({"text": piece, "thought": kind == "think"} for piece in pieces(kind, value))
            for part in chunks:
                yield sse({"candidates": [{"content": {"role": "model", "parts": [part]}}]})
            seal = {} if kind == "call" else seal
        end = {"role": "model", "parts": [{"text": "", **seal}]}
        usage = {"promptTokenCount": tokens, "candidatesTokenCount": 9, "totalTokenCount": tokens + 9}
        yield sse({"candidates": [{"content": end, "finishReason": "STOP"}], "usageMetadata": usage})


class Anthropic(Wire):
    name, api, base, path, model = "anthropic", "anthropic-messages", "", "/v1/messages", {"id": "claude-m4"}
    fields = ("model messages system tools tool_choice thinking output_config context_management metadata max_tokens "
              "stream")
    overflow = {"type": "invalid_request_error", "message": "prompt is too long: 208310 tokens > 200000 maximum"}

    def read(self, body: Dict[str, Any]) -> Tuple[List[Turn], Dict[str, Any]]:
        turns: List[Turn] = []
        for message in body["messages"]:
            # a system turn may change no more than the effort (Messages API, output_config of system turns)
            expect(message["content"] or (message["role"] == "system" and message["output_config"]["effort"]),
                   "a turn says something", message)
            for block in inner_parts(message["content"]):
                kind = block["type"]
                turn = turn_of(turns, "tool" if kind == "tool_result" else message["role"])
                turn.text += block.get("text", "")
                turn.thoughts += [f"{block['thinking']}|{block['signature']}"] if kind == "thinking" else []
                turn.calls.update({block["id"]: block["name"]} if kind == "tool_use" else {})
                if kind == "tool_result":
                    expect(block["tool_use_id"] not in turn.results, "one result for a call", block)
                    texts = [part.get("text", "") for part in inner_parts(block.get("content"))]
                    turn.results[block["tool_use_id"]] = "".join(texts)
                for part in (block, *inner_parts(block.get("content"))):
                    turn.take("data:{media_type};base64,{data}".format(**part["source"])) if "source" in part else None
        return turns, {tool["name"]: tool["input_schema"] for tool in body.get("tools", ())}

    def answer(self, parts: List[Any]) -> Iterator[bytes]:
        def event(kind: str, **fields: Any) -> bytes:
            return sse({"type": kind, **fields}, kind)
        parts, tokens = counted(parts)
        yield event("message_start", message={
            "id": f"msg_{next(numbers)}", "type": "message", "role": "assistant", "model": "claude-m4", "content": [],
            "stop_reason": None, "usage": {"input_tokens": tokens, "output_tokens": 1}})
        for index, (kind, value) in enumerate(parts):
            block, delta, field = {
                "think": ({"type": "thinking", "thinking": "", "signature": ""}, "thinking_delta", "thinking"),
                "text": ({"type": "text", "text": ""}, "text_delta", "text"),
                "call": ({"type": "tool_use", "id": f"toolu_{next(numbers)}", "name": value[0], "input": {}},
                         "input_json_delta", "partial_json")}[kind]
            yield event("content_block_start", index=index, content_block=block)
            for piece in pieces(kind, value):
                yield event("content_block_delta", index=index, delta={"type": delta, field: piece})
            if kind == "think":
                seal = {"type": "signature_delta", "signature": self.said_thought(value, secret(self.name))}
                yield event("content_block_delta", index=index, delta=seal)
            yield event("content_block_stop", index=index)
        stop = "tool_use" if any(kind == "call" for kind, _ in parts) else "end_turn"
        yield event("message_delta", delta={"stop_reason": stop}, usage={"output_tokens": 9}) + event("message_stop")


WIRES: List[Any] = [Chat(), Responses(), Gemini(), Anthropic()]


def keys(value: Any) -> Iterator[str]:
    """All names of fields, but for those in schemas, in arguments, and in the tools that a search has found."""
    if isinstance(value, dict) and value.get("type") == "tool_search_output":
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield str(key)
        if key not in ("parameters", "parametersJsonSchema", "args"):
            yield from keys(inner)


def check_request(wire: Any, raw: bytes, turns: List[Turn], tools: Dict[str, Any]) -> None:
    waiting: Dict[str, str] = {}
    body = json.loads(raw)
    for turn in turns:
        expect(turn.role == "tool" or not waiting, "calls have results right behind them", waiting)
        expect(set(turn.results) <= set(waiting), "results have calls before them", (turn.results, waiting))
        waiting = {**{key: name for key, name in waiting.items() if key not in turn.results}, **turn.calls}
    expect(not waiting and turns[-1].role != "assistant", "the last turn is the user's", (waiting, turns[-1].role))
    for name, schema in tools.items():
        expect(schema["type"] == "object" and not {"anyOf", "oneOf", "allOf"} & set(schema), f"{name}'s schema", schema)
    for other in WIRES:
        expect(other is wire or secret(other.name)[:12].encode() not in raw, f"no thinking of {other.name}'s here")
    expect(not set(body) - set(wire.fields.split()), "only fields of this protocol", set(body))
    expect(len(body.get("user") or "") <= 64, "OpenAI's limit of user", body.get("user"))
    if wire.name != "anthropic":
        expect(not ANTHROPIC_ONLY & set(keys(body)), "no fields of Anthropic's", ANTHROPIC_ONLY & set(keys(body)))
        expect(b"x-anthropic-billing" not in raw, "no accounting line")
