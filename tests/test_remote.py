"""The cache of remote files, with a real server on this machine: complete copies, one download a node, the bound."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfmask import urls
from cfmask.data import remote
from cfmask.errors import UserError
from made import forkserver

KB = 1000


def made(size, seed=0):
    return random.Random(seed).randbytes(size)


def sha(data):
    return hashlib.sha256(data).hexdigest()


class Server(ThreadingHTTPServer):
    """files: contents by path. faults: what happens to the next requests for a path, a function of the handler each;
    a request without one is answered properly. requests: (path, Range header) of each so far."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.requests = {}, defaultdict(list), []
        self.sending, self.over, self.ranges = threading.Event(), threading.Event(), True

    def put(self, path, data):
        self.files[path] = data
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        path, wanted = urlsplit(self.path).path, self.headers.get("Range")
        self.server.requests.append((path, wanted))
        self.data = self.server.files.get(path)
        if self.server.faults[path]:
            self.server.faults[path].pop(0)(self)
        elif self.data is None:
            self.send_error(404)
        elif wanted and self.server.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(self.data):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(self.data) - 1}/{len(self.data)}")
            self.body(self.data[start:])
        else:
            self.send_response(200)
            self.body(self.data)

    def body(self, data, length=None):
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)
        self.server.sending.set()

    def log_message(self, *_):
        pass


def status(code):
    return lambda handler: handler.send_error(code)


def other(data):
    def answer(handler):
        handler.send_response(200)
        handler.body(data)

    return answer


def dropped(after):
    def answer(handler):
        handler.send_response(200)
        handler.body(handler.data[:after], len(handler.data))  # the connection closes behind it

    return answer


def stalled(after, seconds=10):
    def answer(handler):
        dropped(after)(handler)
        handler.wfile.flush()
        handler.server.over.wait(seconds)

    return answer


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF_S", 0.01)


@pytest.fixture
def cache(tmp_path):
    return remote.Cache(tmp_path / "cache", 1000 * KB)


def copies(cache):
    """Names of the copies in the cache, without their hash, and what must never stay: parts."""
    names = [name for name in os.listdir(cache._folder) if not name.startswith(".")]
    return sorted(name if name.endswith(".part") else name.rpartition(".")[0] for name in names)


def contents(cache, url, size=None, sha256=None):
    with cache.open(url, size=size, sha256=sha256) as file:
        return file.read()


def refused(call, *parts):
    """The message of the UserError that ``call`` has to raise: one paragraph with all ``parts``."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "folder", "file"),
    [
        ("http://h/x", "http://h/x/train", "http://h/x/a%20b.tar"),
        ("https://h:1/x//", "https://h:1/x/train", "https://h:1/x/a%20b.tar"),
        ("https://h/x/?t=1/2&u=a%20b", "https://h/x/train?t=1/2&u=a%20b", "https://h/x/a%20b.tar?t=1/2&u=a%20b"),
        ("pipe:cat /x/{}", "pipe:cat /x/train/{}", "pipe:cat /x/'a b.tar'"),
        ("pipe:cat '/x y'/{} -", "pipe:cat '/x y'/train/{} -", "pipe:cat '/x y'/'a b.tar' -"),
        ("pipe:a {} || b {}", "pipe:a train/{} || b train/{}", "pipe:a 'a b.tar' || b 'a b.tar'"),
    ],
)
def test_names_are_inserted_into_urls(where, folder, file):
    assert urls.is_remote(where)
    assert urls.join(where, "train") == folder
    assert urls.file_url(where, "a b.tar") == file


def test_paths_are_not_remote(tmp_path):
    for where in (tmp_path, str(tmp_path), "shards", "pipes/x", "gs:x"):
        assert not urls.is_remote(where)


def test_a_pipe_without_a_place_for_names_is_refused_with_an_example():
    for call in (urls.join, urls.file_url):
        refused(
            lambda call=call: call("pipe:cat /x", "train"), "pipe:cat /x ", "`pipe:aws s3 cp s3://bucket/shards/{} -`"
        )


NAMES = st.text(st.characters(exclude_characters="\0/{}", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name not in (".", "..")
)


@given(folder=NAMES, name=NAMES)
@settings(max_examples=60, deadline=None)
def test_any_name_reaches_the_command_unchanged(folder, name):
    url = urls.file_url(urls.join("http://h/x?q=1", folder), name)
    assert unquote(urlsplit(url).path) == f"/x/{folder}/{name}" and urlsplit(url).query == "q=1"
    command = urls.file_url(urls.join("pipe:printf %s '/x y'/{}", folder), name).removeprefix("pipe:")
    assert subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE).stdout == f"/x y/{folder}/{name}".encode()


@pytest.mark.parametrize("where", ["pipe:cat '/x/{}'", 'pipe:cat "/x/{}"', "pipe:cat /x/\\{}", "pipe:cat it's/{}"])
def test_a_name_never_ends_the_quotes_of_the_user(where):
    assert urls.file_url(where, "a.tar") == where.replace("{}", "a.tar")
    for name in ("'; touch x; '", "$(touch x)", "a b"):
        refused(lambda name=name: urls.file_url(where, name), "outside of quotes")


# --- reading --------------------------------------------------------------------------------------------------------


def test_small_files_are_read_whole(server, tmp_path):
    data = made(70 * KB)
    url = server.put("/set/manifest.json", data)
    assert remote.read(url) == data
    (tmp_path / "m.json").write_bytes(data)
    assert remote.read(f"pipe:cat {tmp_path}/m.json") == data
    assert remote.read(server.put("/empty", b"")) == b""


def test_temporary_errors_are_retried_with_growing_pauses(server, monkeypatch):
    pauses = []
    monkeypatch.setattr(remote, "BACKOFF_S", 0.5)
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=pauses.append))
    url = server.put("/m.json", b"contents")
    server.faults["/m.json"] = [status(503), status(429), dropped(4)]
    assert remote.read(url) == b"contents"
    assert pauses == [0.5, 1, 2]


def test_a_lasting_error_is_one_paragraph(server, tmp_path, monkeypatch):
    url = server.put("/m.json", b"contents")
    server.faults["/m.json"] = [status(503)] * 9
    refused(lambda: remote.read(url), url, "503", "attempt 4 of 4", "Check the address")
    refused(lambda: remote.read(url, attempts=2), "attempt 2 of 2")
    assert len(server.requests) == 6
    server.faults.clear()

    refused(lambda: remote.read(url + "x"), url + "x", "404", "Check the address")
    assert len(server.requests) == 7, "a file that is not there is not asked for again"
    refused(lambda: remote.read("http://127.0.0.1:1/m.json"), "http://127.0.0.1:1/m.json", "connect")

    monkeypatch.setenv("PATH", str(tmp_path))
    refused(lambda: remote.read(url), "curl", "not installed")


def test_a_pipe_that_fails_midway_is_noticed_and_quoted(tmp_path):
    (tmp_path / "file").write_bytes(made(300))
    command = f"pipe:head -c 100 {tmp_path}/file\n echo no such\n\n bucket >&2; echo >> {tmp_path}/tries; exit 1"
    refused(lambda: remote.read(command), "status 1 ", "no such bucket", "attempt 4 of 4", "Run the command")
    assert (tmp_path / "tries").read_text() == "\n" * 4
    refused(lambda: remote.read("pipe:no-such-command x"), "status 127", "no-such-command")
    flaky = f"head -c 100 {tmp_path}/file; mkdir {tmp_path}/once && exit 1; tail -c +101 {tmp_path}/file"
    assert remote.read(f"pipe:{flaky}") == made(300)
    refused(lambda: remote.read(f"pipe:cat {tmp_path}/file; kill -PIPE $$"), "status -13")


def test_silence_is_an_error(server, monkeypatch):
    monkeypatch.setattr(remote, "HTTP_STALL_S", 1)
    monkeypatch.setattr(remote, "PIPE_STALL_S", 0.3)
    url = server.put("/m.json", made(5 * KB))
    server.faults["/m.json"] = [stalled(KB)]
    started = time.monotonic()
    assert remote.read(url) == made(5 * KB)
    refused(lambda: remote.read("pipe:echo x; exec sleep 600", attempts=2), "anything for 0.3 seconds")
    refused(lambda: remote.read("pipe:exec >&-; exec sleep 600", attempts=1), "nor ended")
    assert time.monotonic() - started < 120


# --- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
def test_a_file_is_downloaded_once(server, tmp_path, known):
    cache = remote.Cache(tmp_path / "cache", 9000 * KB)
    data = made(300 * KB)
    facts = (len(data), sha(data)) if known else (None, None)
    url = server.put("/set/train-000000.tar", data) + "?token=a/b"
    assert contents(cache, url, *facts) == contents(cache, url, *facts) == data
    assert len(server.requests) == 1
    (tmp_path / "train-000001.tar").write_bytes(data)
    url = f"pipe:cat {tmp_path}/train-000001.tar -</dev/null"
    assert contents(cache, url, *facts) == data
    (tmp_path / "train-000001.tar").unlink()
    assert contents(cache, url, *facts) == data
    assert copies(cache) == ["train-000000.tar", "train-000001.tar"]
    with cache.open(url, size=None, sha256=None if not known else sha(data)) as file:
        assert os.pread(file.fileno(), 10, 7) == data[7:17]
        with pytest.raises(OSError):
            os.write(file.fileno(), b"x")


def open_many(cache, urls, size, sha256, threads, results):
    with ThreadPoolExecutor(threads) as pool:
        for data in pool.map(lambda url: contents(cache, url, size, sha256), urls):
            results.put(sha(data))


def test_processes_and_threads_share_one_download(server, cache):
    data = made(400 * KB)
    url = server.put("/a.tar", data)
    server.faults["/a.tar"] = [lambda handler: (time.sleep(0.3), other(data)(handler))]
    processes = forkserver()
    results = processes.Queue()
    children = [
        processes.Process(target=open_many, args=(cache, [url] * 4, len(data), sha(data), 4, results)) for _ in range(4)
    ]
    for child in children:
        child.start()
    assert {results.get(timeout=180) for _ in range(16)} == {sha(data)}
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert len(server.requests) == 1 and copies(cache) == ["a.tar"]


def test_a_copy_that_appears_just_before_the_lock_is_taken_is_used(server, cache, monkeypatch):
    url = server.put("/a.tar", made(50 * KB))
    contents(cache, url)
    look, looks = remote._open_copy, []
    monkeypatch.setattr(remote, "_open_copy", lambda *args: looks.append(args) or (len(looks) > 1 and look(*args)))
    assert contents(cache, url) == made(50 * KB)
    assert len(looks) == 2 and len(server.requests) == 1 and copies(cache) == ["a.tar"]


def test_a_killed_download_leaves_no_process(server, cache):
    data = made(400 * KB)
    url = server.put("/a.tar", data)
    server.faults["/a.tar"] = [stalled(300 * KB)]
    processes = forkserver()
    results = processes.Queue()
    child = processes.Process(target=open_many, args=(cache, [url], len(data), None, 1, results))
    child.start()
    assert server.sending.wait(300)
    assert copies(cache) == [f"{remote._copy_name(url, None)}.part"]
    waiting = ThreadPoolExecutor(1).submit(contents, cache, url, len(data), None)
    time.sleep(0.1)
    assert not waiting.done()
    os.kill(child.pid, signal.SIGKILL)
    assert waiting.result(300) == data, "the kernel has released its lock"
    child.join()
    assert results.empty() and copies(cache) == ["a.tar"]


def test_files_of_a_killed_download_are_removed_by_the_next_one(server, cache):
    a, b = made(900 * KB, 1), made(300 * KB, 2)
    cache._folder.mkdir()
    left = cache._folder / (remote._copy_name("http://h/gone.tar", None) + ".part")
    left.write_bytes(a)
    foreign = [cache._folder / name for name in ("thesis.tex", "other.part", "train.tar")]
    for path in foreign:
        path.write_bytes(a)
    assert contents(cache, server.put("/b.tar", b), len(b)) == b
    assert not left.exists()
    assert all(path.read_bytes() == a for path in foreign), "only the cache's own files are counted and removed"
    # Of the same file: it is overwritten.
    url = server.put("/c.tar", b)
    (cache._folder / (remote._copy_name(url, None) + ".part")).write_bytes(a)
    assert contents(cache, url) == b


def test_the_least_recently_opened_go_first_and_readers_keep_what_they_opened(server, cache):
    data = {name: made(300 * KB, seed) for seed, name in enumerate("abcde")}
    urls = {name: server.put(f"/{name}.tar", content) for name, content in data.items()}

    def use(name):
        time.sleep(0.02)  # further apart than the clock of file systems ticks
        assert contents(cache, urls[name], 300 * KB, sha(data[name])) == data[name]

    for name in "abc":
        use(name)
    reader = cache.open(urls["b"], size=300 * KB, sha256=sha(data["b"]))
    use("a")
    use("d")
    assert copies(cache) == ["a.tar", "b.tar", "d.tar"]
    use("a")
    use("e")
    assert copies(cache) == ["a.tar", "d.tar", "e.tar"]
    with reader:
        assert reader.read() == data["b"]
    assert len(server.requests) == 5


@pytest.mark.parametrize("known", [True, False])
def test_the_bound_always_holds_for_all_processes_of_the_folder(server, cache, known):
    """A thread's locks are those of a process. Twelve files of 300 KB, four callers, three fit."""
    data = made(300 * KB)
    urls = [server.put(f"/{i}.tar", data) for i in range(12)]
    for url in urls:  # slow enough to overlap
        server.faults[urlsplit(url).path] = [lambda handler: (time.sleep(0.05), other(data)(handler))] * 4
    most, over = [], threading.Event()

    def watch():
        while not over.wait(0.002):
            if (cache._folder / ".lock").exists():
                with remote._locked(cache._folder / ".lock"):
                    most.append(sum(entry.stat().st_size for entry in os.scandir(cache._folder)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    callers = [remote.Cache(cache._folder, 1000 * KB) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda i: contents(callers[i % 4], urls[i * 5 % 12], 300 * KB if known else None), range(24))
        )
    over.set()
    watcher.join()
    assert set(found) == {data}
    assert 600 * KB <= max(most) <= 1000 * KB


def test_a_file_that_cannot_fit_names_the_setting(server, cache):
    url = server.put("/a.tar", made(1200 * KB))
    refused(lambda: cache.open(url, size=1200 * KB, sha256=None), url, "0.0012 GB", "0.001 GB", "--cache-gb")
    assert not server.requests
    refused(lambda: cache.open(url, size=None, sha256=None), url, "--cache-gb")
    refused(lambda: cache.open("pipe:yes", size=None, sha256=None), "pipe:yes", "--cache-gb")
    assert copies(cache) == []
    assert contents(cache, server.put("/b.tar", made(1000 * KB)), None) == made(1000 * KB)


def test_an_interrupted_download_is_resumed_and_verified_as_a_whole(server, cache):
    data = made(400 * KB)
    url = server.put("/a.tar", data)
    server.faults["/a.tar"] = [dropped(250 * KB), status(503)]
    assert contents(cache, url, len(data), sha(data)) == data
    assert [wanted for _, wanted in server.requests] == [None, "bytes=250000-", "bytes=250000-"]

    server.ranges = False
    server.requests.clear()
    server.faults["/b.tar"] = [dropped(250 * KB), dropped(400 * KB), dropped(250 * KB)]
    assert contents(cache, server.put("/b.tar", data), len(data), sha(data)) == data
    assert [wanted for _, wanted in server.requests] == [None, "bytes=250000-", None, None]

    server.ranges = True
    server.requests.clear()
    server.files["/c.tar"] = data
    server.faults["/c.tar"] = [
        lambda handler: (dropped(250 * KB)(handler), server.put("/c.tar", made(400 * KB, 1))),
    ]
    assert contents(cache, server.put("/c.tar", data), len(data), sha(made(400 * KB, 1))) == made(400 * KB, 1)
    assert [wanted for _, wanted in server.requests] == [None, "bytes=250000-", None], "two halves of two files"

    server.requests.clear()
    server.faults["/d.tar"] = [lambda handler: (dropped(250 * KB)(handler), server.put("/d.tar", b"short"))]
    assert contents(cache, server.put("/d.tar", data), None, sha(b"short")) == b"short"
    assert [wanted for _, wanted in server.requests] == [None, "bytes=250000-", None], "nothing to continue"


def test_without_sha256_two_responses_are_not_combined(server, cache):
    data = made(400 * KB)
    server.faults["/a.tar"] = [dropped(250 * KB)] * 2
    assert contents(cache, server.put("/a.tar", data)) == data
    assert [wanted for _, wanted in server.requests] == [None] * 3


def test_wrong_contents_are_downloaded_again_and_never_used(server, cache, tmp_path):
    data = made(50 * KB)
    url = server.put("/a.tar", data)
    wrong = [other(made(50 * KB, 1)), other(data[:-1]), other(data + b"x")]
    server.faults["/a.tar"] = wrong.copy()
    assert contents(cache, url, len(data), sha(data)) == data

    remade = made(50 * KB, 2)
    refused(lambda: cache.open(url, size=len(data), sha256=sha(remade)), url, sha(data), sha(remade), "manifest")
    refused(lambda: cache.open(url + "?", size=len(data) + 1, sha256=None), "50000 bytes came, 50001 were expected")
    refused(lambda: cache.open(url + "?", size=len(data) - 1, sha256=None), "50000 bytes came, 49999 were expected")
    (tmp_path / "f").write_bytes(data)
    half = f"pipe:head -c 100 {tmp_path}/f"
    refused(lambda: cache.open(half, size=len(data), sha256=None), half, "100 bytes came", "attempt 4 of 4")
    refused(lambda: cache.open(half + "; exit 1", size=None, sha256=None), "status 1")
    refused(lambda: cache.open(url + "x", size=None, sha256=None), "404")
    assert copies(cache) == ["a.tar"]


def test_a_set_that_was_made_again_under_its_url_is_another_set(server, cache):
    old, new = made(50 * KB), made(50 * KB, 1)
    assert contents(cache, server.put("/a.tar", old), len(old), sha(old)) == old
    assert contents(cache, server.put("/a.tar", new), len(new), sha(new)) == new
    assert contents(cache, server.put("/b.tar", old), len(old), sha(old)) == old
    assert copies(cache) == ["a.tar", "a.tar", "b.tar"]


@pytest.mark.parametrize("size", [50 * KB, None])
def test_a_truncated_copy_is_downloaded_again(server, cache, size):
    data = made(50 * KB)
    url = server.put("/a.tar", data)
    contents(cache, url, size)
    (copy,) = cache._folder.glob("a.tar.*")
    os.truncate(copy, 0 if size is None else 30 * KB)
    assert contents(cache, url, size) == data
    assert len(server.requests) == 2


def test_copies_are_removed_when_the_disk_is_full(server, cache, monkeypatch):
    urls = [server.put(f"/{i}.tar", made(100 * KB, i)) for i in range(4)]
    for url in urls[:3]:
        contents(cache, url)
        time.sleep(0.02)
    write = os.write

    def full(descriptor, data, room=1):
        if len([name for name in os.listdir(cache._folder) if not name.startswith(".") and ".part" not in name]) > room:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[: 10 * KB])

    monkeypatch.setattr(remote.os, "write", full)
    assert contents(cache, urls[3], 100 * KB) == made(100 * KB, 3)
    assert copies(cache) == ["2.tar", "3.tar"]
    monkeypatch.setattr(remote.os, "write", lambda descriptor, data: full(descriptor, data, -1))
    refused(lambda: cache.open(urls[0], size=None, sha256=None), str(cache._folder), "No space left", "room")
    assert copies(cache) == []


def test_a_folder_that_cannot_be_used_is_named(server, tmp_path):
    (tmp_path / "file").touch()
    cache = remote.Cache(tmp_path / "file" / "cache", 1000)
    refused(lambda: cache.open(server.put("/a", b"x"), size=1, sha256=None), str(tmp_path / "file"), "local disk")


def test_the_module_does_not_import_torch():
    code = "import cfmask.data.remote, sys; sys.exit('torch' in sys.modules or 'webdataset' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(os.path.dirname(__file__))).returncode == 0


# --- other users, and copies that have changed ------------------------------------------------------------------------


def copy_of(cache, name="a.tar"):
    (copy,) = cache._folder.glob(f"{name}.*")
    return copy


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("how", ["in place", "exchanged", "planted without a mark"])
def test_a_copy_of_the_right_size_with_other_contents_is_downloaded_again(server, cache, known, how):
    data, other = made(50 * KB), made(50 * KB, 1)
    url = server.put("/a.tar", data)
    facts = (len(data), sha(data)) if known else (len(data), None)
    assert contents(cache, url, *facts) == data
    copy = copy_of(cache)
    if how == "in place":
        copy.write_bytes(other)
    else:
        copy.rename(copy.with_name("other"))
        copy.write_bytes(other)
        os.utime(copy, ns=(0, copy.with_name("other").stat().st_mtime_ns))
    if how.startswith("planted"):
        remote._mark_of(copy).unlink()
    assert contents(cache, url, *facts) == data
    assert len(server.requests) == 2


def test_a_copy_is_hashed_once_and_again_after_a_reboot(server, cache, monkeypatch):
    data = made(50 * KB)
    url = server.put("/a.tar", data)
    contents(cache, url, len(data), sha(data))
    hashed, real = [], remote._verified
    monkeypatch.setattr(remote, "_verified", lambda copy, *rest: hashed.append(copy) or real(copy, *rest))
    for _ in range(3):
        assert contents(cache, url, len(data), sha(data)) == data
    assert not hashed
    monkeypatch.setattr(remote, "this_machine", lambda: "another boot")
    for _ in range(3):
        assert contents(cache, url, len(data), sha(data)) == data
    assert hashed == [copy_of(cache)]
    assert len(server.requests) == 1


def test_links_in_the_cache_are_not_followed(server, cache, tmp_path):
    data, other = made(50 * KB), made(50 * KB, 1)
    url = server.put("/a.tar", data)
    contents(cache, url, len(data))
    copy = copy_of(cache)
    (tmp_path / "elsewhere").write_bytes(other)
    copy.unlink()
    copy.symlink_to(tmp_path / "elsewhere")
    assert contents(cache, url, len(data)) == data
    assert (tmp_path / "elsewhere").read_bytes() == other
    (cache._folder / ".lock").unlink()
    (cache._folder / ".lock").symlink_to(tmp_path / "elsewhere")
    refused(lambda: contents(cache, server.put("/b.tar", data)), "cannot be stored", str(cache._folder))


def test_the_cache_belongs_to_one_user(server, tmp_path, monkeypatch):
    """On a disk that all users write to, like /tmp, where another user may have created the folder."""
    url = server.put("/a.tar", made(5 * KB))
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    own = shared / f"cfmask-cache-{os.geteuid()}"
    for way in ("tmp", "variable"):
        monkeypatch.delenv("CFMASK_CACHE", raising=False)
        monkeypatch.setattr("tempfile.tempdir", str(shared))
        if way == "variable":
            monkeypatch.setenv("CFMASK_CACHE", str(shared))
        assert contents(remote.node_cache(), url) == made(5 * KB)
        assert own.stat().st_mode & 0o777 == 0o700 and len(list(own.glob("a.tar.*"))) == 1
    assert len(server.requests) == 1

    own.chmod(0o777)
    contents(remote.node_cache(), url)
    assert own.stat().st_mode & 0o777 == 0o700

    away = own.rename(shared / "away")
    own.symlink_to(away)
    refused(lambda: contents(remote.node_cache(), url), str(own), "is not a folder", "--cache-dir")
    own.unlink()
    if os.geteuid() == 0:
        own.mkdir()
        os.chown(own, 4711, 4711)
        refused(lambda: contents(remote.node_cache(), url), str(own), "belongs to user 4711")
        own.rmdir()
    shared.chmod(0o777)
    refused(lambda: contents(remote.node_cache(), url), str(shared), "writable for all users (mode 777)")
