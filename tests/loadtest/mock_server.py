"""An OpenAI-like server that streams words at known times, as a process of its own. Knows no model.

Prints its port as the first line. `--fail-every K`: every Kth completion is refused (500), `--drop-every K`:
its connection is closed without an answer, `--cut-every K`: cut off after two tokens, `--error-every K`: ends with an
error event. `GET /seen` gives the requests it got.
"""

import argparse
import asyncio
import json

from aiohttp import web


class Mock:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.count = 0
        self.seen: list[dict] = []
        self.peers: set[object] = set()

    async def models(self, request: web.Request) -> web.Response:
        base = {
            "id": "mock",
            "object": "model",
            "created": 0,
            "owned_by": "test",
            "parent": None,
            "root": "mock",
        }
        adapters = [
            {**base, "id": f"mock/{name}", "parent": "mock", "root": name}
            for name in self.options.adapters.split(",")
            if name
        ]
        return web.json_response({"object": "list", "data": [base, *adapters]}, headers={"Server": "mock/1"})

    async def requests_seen(self, request: web.Request) -> web.Response:
        return web.json_response({"requests": self.seen, "connections": len(self.peers)})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            return await self.answer(request, response)
        except ConnectionResetError:
            return response

    async def answer(self, request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        start = loop.time()
        body = await request.json()
        self.count += 1
        self.seen.append({"body": body, "authorization": request.headers.get("Authorization")})
        self.peers.add(request.transport.get_extra_info("peername") if request.transport else None)
        options = self.options
        if self._every(options.drop_every):
            assert request.transport is not None
            request.transport.close()
            return response
        if self._every(options.fail_every):
            error = {"message": "the mock is tired", "type": "server_error", "param": None, "code": "tired"}
            return web.json_response({"error": error}, status=500)
        cut, broken = self._every(options.cut_every), self._every(options.error_every)
        chat = "messages" in body
        tokens = body.get("max_tokens", 16)
        await response.prepare(request)

        async def send(choices: list[dict], **more: object) -> None:
            event = {"id": "x", "object": "chunk", "model": body["model"], "choices": choices, **more}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        if chat:
            await send([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        for number in range(tokens):
            due = start + (options.ttft_ms + number * options.itl_ms) / 1000
            await asyncio.sleep(max(0.0, due - loop.time()))
            if cut and number == 2:
                assert request.transport is not None
                request.transport.close()
                return response
            if broken and number == 2:
                await response.write(
                    b'data: {"error": {"message": "engine lost", "code": "engine_lost"}}\n\n'
                )
                return response
            said = {"delta": {"content": f" w{number}"}} if chat else {"text": f" w{number}"}
            await send([{"index": 0, **said, "finish_reason": "length" if number == tokens - 1 else None}])
        if body.get("stream_options", {}).get("include_usage"):
            usage = {"prompt_tokens": 40, "completion_tokens": tokens, "total_tokens": 40 + tokens}
            await send([], usage={**usage, "prompt_tokens_details": {"cached_tokens": 8}})
        await response.write(b"data: [DONE]\n\n")
        return response

    def _every(self, period: int) -> bool:
        return bool(period) and self.count % period == 0


async def serve(options: argparse.Namespace) -> None:
    mock = Mock(options)
    app = web.Application()
    app.router.add_get("/v1/models", mock.models)
    app.router.add_get("/seen", mock.requests_seen)
    app.router.add_post("/v1/chat/completions", mock.completions)
    app.router.add_post("/v1/completions", mock.completions)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)  # noqa: T201
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ttft-ms", type=float, default=20)
    parser.add_argument("--itl-ms", type=float, default=2)
    parser.add_argument("--adapters", default="")
    parser.add_argument("--fail-every", type=int, default=0)
    parser.add_argument("--drop-every", type=int, default=0)
    parser.add_argument("--cut-every", type=int, default=0)
    parser.add_argument("--error-every", type=int, default=0)
    asyncio.run(serve(parser.parse_args()))
