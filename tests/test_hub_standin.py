"""The stand-in against the real client, which must not notice the difference.

HF_HUB_DISABLE_XET=1 has to be in the environment before huggingface_hub is first imported:
tests/conftest.py sets it.
"""

import http.client
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_standin import HIDDEN, MAX_BODY_BYTES, HubStandIn
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import _CACHED_NO_EXIST

# The client passes an LFS file to httpx2 in a way that httpx2 no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<:DeprecationWarning")

REPO = "tester/tiny"
TOKEN = "hf_never_recorded"
WEIGHTS = bytes(range(256)) * 200
FILES = {
    "README.md": b"---\nlicense: apache-2.0\n---\n# Tiny\n",
    "config.json": b'{"model_type": "bert"}',
    "empty.txt": b"",
    "model.safetensors": WEIGHTS,
    "plan/heads and rows.json": b"[0, 2]",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    assert constants.HF_HUB_DISABLE_XET, "Set HF_HUB_DISABLE_XET=1 before huggingface_hub starts."
    # Its user agent asks the endpoint of the environment, not that of HfApi, which agent runs it.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    with HubStandIn() as hub:
        yield hub


@pytest.fixture
def api(hub: HubStandIn) -> HfApi:
    return HfApi(endpoint=hub.url, token=TOKEN)


def push(
    api: HfApi, files: dict[str, bytes], title: str = "push", parent: str | None = None
) -> str:
    """Commit ``files`` to REPO and return the commit's id."""
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    return api.create_commit(REPO, operations, commit_message=title, parent_commit=parent).oid


@pytest.fixture
def pushed(api: HfApi) -> str:
    """Id of the commit that put FILES into the new REPO."""
    api.create_repo(REPO)
    return push(api, FILES)


def read_tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_push_takes_the_documented_path(hub: HubStandIn, pushed: str) -> None:
    assert hub.files(REPO) == FILES
    assert hub.commits(REPO) == ["initial commit", "push"]
    assert hub.repos[REPO][-1].oid == pushed
    oid = hub.requests[4].path.rsplit("/", 1)[1]
    assert [(method, path) for method, path, _ in hub.requests] == [
        ("POST", "/api/repos/create"),
        ("POST", "/api/validate-yaml"),
        ("POST", f"/api/models/{REPO}/preupload/main"),
        ("POST", f"/{REPO}.git/info/lfs/objects/batch"),
        ("PUT", f"/{REPO}.git/info/lfs/{oid}"),
        ("POST", f"/{REPO}.git/info/lfs/verify"),
        ("POST", f"/api/models/{REPO}/commit/main"),
    ]


def test_tokens_are_seen_but_not_recorded(hub: HubStandIn, pushed: str) -> None:
    assert TOKEN not in repr(hub.requests)
    for request in hub.requests:
        assert request.headers.get("authorization") == (None if request.method == "PUT" else HIDDEN)


def test_snapshot_equals_what_was_pushed(hub: HubStandIn, pushed: str, tmp_path: Path) -> None:
    folder = snapshot_download(REPO, endpoint=hub.url, token=False, cache_dir=tmp_path)
    assert Path(folder).name == pushed
    assert read_tree(Path(folder)) == FILES


def test_old_revision_stays_readable(hub: HubStandIn, api: HfApi, tmp_path: Path) -> None:
    api.create_repo(REPO)
    old = push(api, {"model.safetensors": b"old"})
    push(api, {"model.safetensors": b"new"}, parent=old)
    for revision, content in (("main", b"new"), (old, b"old")):
        path = hf_hub_download(
            REPO, "model.safetensors", revision=revision, endpoint=hub.url, cache_dir=tmp_path
        )
        assert Path(path).read_bytes() == content


def test_listings(api: HfApi, pushed: str) -> None:
    info = api.model_info(REPO, files_metadata=True)
    assert (info.id, info.sha) == (REPO, pushed)
    assert info.siblings is not None
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings}
    assert sizes == {path: len(data) for path, data in FILES.items()}
    assert sorted(api.list_repo_files(REPO, revision=pushed)) == sorted(FILES)
    top = {entry.path for entry in api.list_repo_tree(REPO)}
    assert top == {path.split("/")[0] for path in FILES}
    assert [entry.path for entry in api.list_repo_tree(REPO, "plan")] == [
        "plan/heads and rows.json"
    ]
    assert api.whoami()["name"] == "tester"


def test_absent_things_are_told_apart(hub: HubStandIn, pushed: str, tmp_path: Path) -> None:
    api = HfApi(endpoint=hub.url, token=False)
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "absent.json", cache_dir=tmp_path)
    absent = try_to_load_from_cache(REPO, "absent.json", cache_dir=tmp_path, revision=pushed)
    assert absent is _CACHED_NO_EXIST
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(REPO, "config.json", revision="0" * 40, cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError):
        api.hf_hub_download("tester/absent", "config.json", cache_dir=tmp_path)


def test_unchanged_push_is_no_commit(hub: HubStandIn, api: HfApi, pushed: str) -> None:
    before = len(hub.requests)
    assert push(api, FILES) == pushed
    assert hub.commits(REPO) == ["initial commit", "push"]
    assert "PUT" not in {request.method for request in hub.requests[before:]}


def test_files_and_folders_are_deleted(hub: HubStandIn, api: HfApi, pushed: str) -> None:
    gone = [CommitOperationDelete("plan/"), CommitOperationDelete("empty.txt")]
    api.create_commit(REPO, gone, commit_message="clean")
    assert set(hub.files(REPO)) == {"README.md", "config.json", "model.safetensors"}
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        api.delete_file("empty.txt", REPO)


def test_stale_parent_is_refused(hub: HubStandIn, api: HfApi, pushed: str) -> None:
    head = push(api, {"config.json": b"{}"}, parent=pushed[:7])
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        push(api, {"config.json": b"[]"}, parent=pushed)
    assert caught.value.response.status_code == 412
    assert hub.repos[REPO][-1].oid == head


def test_without_token_nothing_is_written(hub: HubStandIn, pushed: str) -> None:
    nobody = HfApi(endpoint=hub.url, token=False)
    writes: list[Callable[[], object]] = [
        lambda: nobody.create_repo("tester/other"),
        lambda: push(nobody, {"config.json": b"[]"}),
    ]
    for write in writes:
        with pytest.raises(HfHubHTTPError) as caught:
            write()
        assert caught.value.response.status_code == 401
    assert list(hub.repos) == [REPO]
    assert hub.files(REPO) == FILES


def test_existing_repo_is_a_conflict(api: HfApi, pushed: str) -> None:
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo(REPO)
    assert caught.value.response.status_code == 409
    assert api.create_repo("tiny", exist_ok=True).repo_id == REPO


def test_injected_faults_pass(hub: HubStandIn, api: HfApi, pushed: str) -> None:
    hub.fail_next("POST", f"/api/models/{REPO}/commit", 503, times=2)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError) as caught:
            push(api, {"config.json": b"{}"})
        assert caught.value.response.status_code == 503
        assert hub.files(REPO) == FILES
    push(api, {"config.json": b"{}"})
    assert hub.files(REPO) == FILES | {"config.json": b"{}"}


def test_lost_reply_leaves_the_commit(hub: HubStandIn, api: HfApi, pushed: str) -> None:
    hub.fail_next("POST", f"/api/models/{REPO}/commit", 504, after=True)
    with pytest.raises(HfHubHTTPError):
        push(api, {"config.json": b"{}"}, title="lost")
    assert hub.commits(REPO)[-1] == "lost"


@pytest.mark.parametrize(
    ("wanted", "status", "part"),
    [
        ("bytes=0-9", 206, WEIGHTS[:10]),
        ("bytes=51190-", 206, WEIGHTS[-10:]),
        ("bytes=51190-99999", 206, WEIGHTS[-10:]),
        ("bytes=51200-", 416, b""),
        ("bytes=9-0", 416, b""),
    ],
    ids=["start", "end", "past the end", "outside", "backwards"],
)
def test_range(hub: HubStandIn, pushed: str, wanted: str, status: int, part: bytes) -> None:
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"))
    connection.request("GET", f"/{REPO}/resolve/main/model.safetensors", headers={"Range": wanted})
    response = connection.getresponse()
    assert (response.status, response.read()) == (status, part)
    assert response.getheader("Content-Range", "").endswith(f"/{len(WEIGHTS)}")
    connection.close()


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [("Content-Length", str(MAX_BODY_BYTES + 1), 413), ("Transfer-Encoding", "chunked", 411)],
)
def test_unbounded_bodies_are_refused(
    hub: HubStandIn, header: str, value: str, status: int
) -> None:
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"))
    connection.putrequest("POST", "/api/validate-yaml")
    connection.putheader(header, value)
    connection.endheaders()
    assert connection.getresponse().status == status
    connection.close()


def test_unknown_endpoints_are_named(hub: HubStandIn, api: HfApi, pushed: str) -> None:
    with pytest.raises(HfHubHTTPError, match=r"does not serve GET /api/models/tester/tiny/refs"):
        api.list_repo_refs(REPO)
    assert hub.requests[-1].path.startswith(f"/api/models/{REPO}/refs")


def test_threads_end_with_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hub_standin._Handler.timeout", 0.2)
    before = threading.active_count()
    with HubStandIn() as hub:
        place = hub.url.removeprefix("http://")
        stalled, answered = http.client.HTTPConnection(place), http.client.HTTPConnection(place)
        stalled.connect()
        answered.request("GET", "/api/agent-harnesses")  # accepted after the stalled one
        assert answered.getresponse().status == 200
        assert threading.active_count() > before
    assert threading.active_count() == before
    stalled.close()
    answered.close()
    with pytest.raises(ConnectionRefusedError):
        answered.connect()


def test_environment_leads_a_subprocess_here(hub: HubStandIn, pushed: str, tmp_path: Path) -> None:
    code = f"import huggingface_hub as h; h.snapshot_download({REPO!r}); h.create_repo('other')"
    environment = {**os.environ, **hub.environment(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    assert read_tree(tmp_path / "hub" / "models--tester--tiny" / "snapshots" / pushed) == FILES
    assert list(hub.repos) == [REPO, "tester/other"]
