"""`unigrpo rewards serve`."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from unigrpo_cli.cli import common
from unigrpo_cli.cli.common import one_error_line
from unigrpo_cli.errors import RewardError, UsageError

TOKEN_ENV = "UNIGRPO_REWARD_TOKEN"


@one_error_line
def serve(
    name: Annotated[str, typer.Argument(help="A reward as in --reward, options included.")],
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 0,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help=f"File with the token that clients send; default ${TOKEN_ENV}."),
    ] = None,
    max_mb: Annotated[
        int, typer.Option("--max-mb", min=1, help="Largest request, in MiB; it may have half as many pixels as bytes.")
    ] = 256,
    timeout_s: Annotated[
        float,
        typer.Option("--timeout-s", min=0, help="Seconds for one scoring; the server ends when one takes longer."),
    ] = 600.0,
    device: common.Device = "auto",
    reward_opt: common.RewardOpt = None,
    plugin: common.PluginOption = None,
    plugins_dir: common.PluginsDir = None,
    json: common.Json = False,
) -> None:
    """Serve a reward over HTTP; runs use it with `--reward remote@url=...`.

    Prints its address and runs until Ctrl-C or SIGTERM (exit code 0). Addresses that other machines can reach need a
    token. Traffic is not encrypted: put a TLS proxy or a tunnel in between.
    """
    from unigrpo_cli.rewards.http import RewardServer
    from unigrpo_cli.rewards.spec import parse_rewards
    from unigrpo_cli.run.console import Display

    display = Display(json=json)
    plugins = common.load_plugins(plugin, plugins_dir, display)
    choices = parse_rewards([name], common.reward_options(reward_opt))
    if len(choices) != 1:
        raise UsageError(f"a server serves one reward, not {len(choices)}: start one server for each")
    entry = plugins.rewards.find(choices[0].name)
    server = RewardServer(host, port, read_token(token_file), max_mb * 2**20)
    try:
        with (
            common.rewards_alone(choices, plugins, device, timeout_s) as rewards,
            until_stopped(server.stop),
        ):
            server.listen(rewards, entry.version)
            display.say(f"serving {name} ({entry.address} {entry.version}) at {server.url}")
            if json:
                common.print_json({"url": server.url, "reward": name, "address": entry.address})
            server.serve_forever(poll_interval=0.1)
            server.close()
    finally:
        server.server_close()
    if server.lost:
        raise RewardError(f"{server.lost}; the server ends, because that call may never return")


def read_token(path: Path | None) -> str | None:
    """The token from a file, or from the environment."""
    if path is None:
        return os.environ.get(TOKEN_ENV, "").strip() or None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UsageError(
            f"--token-file {path}: {reason}; it must hold one word of ASCII, e.g. from `openssl rand -hex 32`"
        ) from error
    if not token or not token.isascii() or len(token.split()) != 1:
        raise UsageError(f"--token-file {path} must hold one word of ASCII, e.g. from `openssl rand -hex 32`")
    return token


@contextmanager
def until_stopped(stop: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `stop` inside. While a model loads they interrupt it."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # signals can only be set there
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda *_: stop())
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)
