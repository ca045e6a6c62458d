"""The options of the service: what is refused, and that no message shows a key."""

from pathlib import Path
from typing import Any

import pytest
from pipeline_fixtures import Run, recsys

from recsys2stage.cli import serve as command
from recsys2stage.serving.settings import Settings, is_loopback

KEY = "0123456789abcdef"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.txt"
    path.write_text(f"# of the shop\n{KEY}\n\n  {KEY[::-1]}  \n")
    return path


def test_keys_are_read_from_a_file(keys: Path) -> None:
    settings = Settings(Path("bundle"), host="0.0.0.0", api_keys=keys)
    assert settings.keys == (KEY.encode(), KEY[::-1].encode())
    assert KEY not in repr(settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no API key"),
        ("# none\n", "has no API key"),
        (f"{KEY}\nshort\n", r"line 2: the key has 5 characters, expected at least 16"),
        (f"{KEY} {KEY}\n", "without spaces"),
        (f"{KEY}é\n", "visible ASCII"),
    ],
)
def test_bad_key_files_are_refused_without_a_key_in_the_message(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Settings(Path("bundle"), api_keys=path)
    assert KEY not in str(error.value)
    assert "short" not in str(error.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_without_keys_only_loopback_is_listened_on(host: str, keys: Path) -> None:
    with pytest.raises(ValueError, match=r"--api_keys FILE, or listen on 127.0.0.1"):
        Settings(Path("bundle"), host=host)
    Settings(Path("bundle"), host=host, api_keys=keys)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert is_loopback(host)
    Settings(Path("bundle"), host=host)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 70_000}, "port is 70000, expected 0 to 65535"),
        ({"port": -1}, "port is -1, expected at least 0"),
        ({"workers": 0}, "workers is 0, expected at least 1"),
        ({"queue": 0}, "queue is 0"),
        ({"max_body": 5}, "max_body is 5, expected at least 1,?024"),
        ({"timeout": 0.0}, "timeout is 0.0, expected seconds above 0"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"keep_alive": 1e9}, "keep_alive is 1000000000.0"),
        ({"cors": ("shop.example",)}, "cors holds 'shop.example', expected an origin such as https://shop.example"),
        ({"cors": ("https://shop.example/page",)}, "expected an origin"),
        ({"api_keys": Path("gone.txt")}, "the file of API keys gone.txt cannot be read"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(Path("bundle"), **options)


def test_the_store_lies_beside_the_bundle() -> None:
    assert Settings(Path("runs/demo/current")).store_path == Path("runs/demo/store.sqlite")
    assert Settings(Path("b"), store=Path("s.sqlite")).store_path == Path("s.sqlite")


def test_every_option_of_the_command_reaches_the_settings(monkeypatch: pytest.MonkeyPatch, keys: Path) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr("recsys2stage.serving.server.run", seen.append)
    words = ["--bundle", "b", "--data", "d", "--store", "s", "--host", "0.0.0.0", "--port", 1, "--workers", 3]
    words += ["--api_keys", keys, "--cors", '["https://a.example", "*"]', "--torch_threads", 4, "--batch_size", 5]
    words += ["--queue", 6, "--timeout", 7, "--keep_alive", 8, "--shutdown_timeout", 9, "--max_body", 1_024]
    words += ["--max_k", 11, "--max_list", 12, "--max_batch", 13, "--cached_events", 14, "--cached_states", 15]
    recsys("serve", *words, "--log_requests", "false", "--trust", "mine")
    assert seen == [
        Settings(
            *(Path("b"), Path("d"), Path("s"), "0.0.0.0", 1, 3, keys, ("https://a.example", "*"), ("mine",)),
            *(4, 5, 6, 7.0, 8.0, 9.0, 1_024, 11, 12, 13, 14, 15, False),
        )
    ]
    recsys("serve")
    assert seen[1] == Settings(Path("runs/ml-20m/bundle"))
    recsys("serve", "--cors", "https://shop.example")
    assert seen[2].cors == ("https://shop.example",)


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(SystemExit, match=r"serve needs uvicorn.*pip install 'recsys2stage\[serve\]'"):
        recsys("serve")


def test_what_cannot_be_served_is_refused_in_a_sentence(trained: Run, tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"gone holds neither a bundle nor an index; make a bundle: recsys export-bundle"
    ):
        recsys("serve", "--bundle", tmp_path / "gone", "--port", 0)
    with pytest.raises(SystemExit, match=r"items.parquet cannot be opened .*expected a file of this service"):
        recsys("serve", "--bundle", trained.bundle, "--store", trained.bundle / "items.parquet", "--port", 0)
