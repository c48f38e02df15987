# SPDX-License-Identifier: Apache-2.0
"""The explore page's answers beside other ways to compute them; what it refuses."""

import base64
import contextlib
import http.client
import io
import json
import os
import pathlib
import shutil
import signal
import sys
import threading
import types
import urllib.request

import audit
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mim_jax
from mim_jax import config, explore
from mim_jax.data.sources.digits import Digits
from mim_jax.explore import job, models
from mim_jax.maskings.random import Random
from mim_jax.ops.masking import from_hidden
from mim_jax.ops.patches import Grid, patchify
from mim_jax.run import loading

server = pytest.importorskip(
    "mim_jax.explore.server", reason="the extra explore is not installed"
)

ROOT = pathlib.Path(__file__).parents[1]
OLD = ROOT / "tests" / "fixtures" / "old_runs"
MOST = 50_000  # bytes of an upload


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Run directories: one predicts pixels, the other does not."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        pathlib.Path(shutil.copytree(OLD / name / "run", folder / name))
        for name in ("mae", "mocov3")
    ]


@pytest.fixture(scope="module")
def app(folders):
    runs = loading.load_all(map(str, folders))
    return server.App(runs, bank=10**6, neighbours=5, upload_bytes=MOST)


@pytest.fixture(scope="module")
def address(app):
    with server.serving(app.asgi, 0) as found:
        yield found


@pytest.fixture(scope="module")
def mae(folders):
    return mim_jax.load(folders[0])


@pytest.fixture(scope="module")
def digits():
    """Held-out images, and the training ones."""
    source = Digits()
    return tuple(
        np.stack([split[i]["image"] for i in range(len(split))])
        for split in (source.held_out(), source)
    )


def request(address, path, body=None, **headers):
    """(status, answer) of a request; a header None is left out."""
    host = address.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(host, timeout=120)
    with contextlib.closing(connection):
        method = "GET" if body is None else "POST"
        connection.putrequest(method, path, skip_host=True)
        if body is not None:
            headers = {"content_length": str(len(body))} | headers
        for name, value in ({"host": host} | headers).items():
            if value is not None:
                connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read()


def ask(address, path, want=200, **asked):
    status, answer = request(address, path, json.dumps(asked).encode())
    assert status == want, answer
    return json.loads(answer)


def png(pixels, kind="PNG"):
    content = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(content, kind)
    return content.getvalue()


def sent(pixels):
    return base64.b64encode(png(pixels)).decode()


def shown(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_hidden_patches_are_what_the_run_predicts(address, mae, digits):
    image = digits[0][3]
    hidden = [0, 5, 6, 10, 15]
    found = ask(address, "/fill", image=sent(image), hidden=hidden)
    assert found["hidden"] == hidden and found["runs"][1] is None
    region = np.zeros(16, bool)
    region[hidden] = True
    mask = from_hidden(region[None])
    batch = {"image": jnp.asarray(image[None])}
    predicted = mae.objective.reconstruct(mae.params, batch, mask)
    predicted = np.clip(np.asarray(predicted), 0, 1)[0]
    region = np.kron(region.reshape(4, 4), np.ones((2, 2))).astype(bool)[..., None]
    filled = shown(found["runs"][0]["image"])
    want = np.where(region, predicted * 255, image).squeeze()
    assert np.abs(filled - want).max() <= 0.501  # rounded to 8 bits
    scores = {one["title"]: one["value"] for one in found["runs"][0]["scores"]}
    truth = image / 255

    def decibels(way):
        return -10 * np.log10(
            ((np.broadcast_to(way, truth.shape) - truth)[region] ** 2).mean()
        )

    assert scores["PSNR of hidden pixels"] == pytest.approx(
        decibels(predicted), abs=1e-3
    )
    error = ((predicted - truth)[region] ** 2).mean()
    assert scores["squared error of hidden pixels"] == pytest.approx(error, rel=1e-4)
    mean = truth[~region].mean()
    assert scores["... of the visible mean"] == pytest.approx(decibels(mean), abs=1e-3)
    means = np.asarray(patchify(jnp.asarray(truth[None]), 2)).mean(axis=2)
    means = np.kron(means.reshape(4, 4), np.ones((2, 2)))[..., None]
    known = scores["... of each patch's true mean"]
    assert known == pytest.approx(decibels(means), abs=1e-3)


def test_a_random_mask_hides_as_many_patches_as_asked(address, digits):
    image = sent(digits[0][0])
    masks = {
        tuple(ask(address, "/fill", image=image, count=4, unit=2, seed=seed)["hidden"])
        for seed in range(6)
    }
    # A unit of two patches by two: one of the four is hidden, as a whole.
    units = {(0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15)}
    assert len(masks) > 1 and masks <= units
    for count in (1, 7, 15):
        found = models.drawn(Grid(4, 4, 2), count, 1, seed=3)
        assert found.sum() == count
    for size in range(2, 600):  # no share of patches is rounded to another count
        grid = Grid(1, size, 4)
        for count in {1, size // 3, size - 1} - {0}:
            masking = Random(ratio=count / size, partial_units="allow")
            assert masking.visible_count(grid) == size - count


def test_attention_is_that_of_the_run(address, mae, digits):
    image = digits[0][7]
    mine = ask(address, "/look", image=sent(image), patch=None)["runs"]
    theirs = mae.attention(image[None])[0].mean(axis=0).ravel()
    assert mine[0] == pytest.approx(theirs, abs=2e-6)
    taps = ("attention",)
    images = jnp.asarray(image[None], jnp.float32) / 255
    _, seen = mae.objective.encode(mae.params, images, taps=taps)
    last = np.asarray(seen["attention"])[-1, 0].mean(axis=0)
    for patch in (0, 9, 15):
        mine = ask(address, "/look", image=sent(image), patch=patch)["runs"]
        assert mine[0] == pytest.approx(last[1 + patch, 1:], abs=2e-6)
        assert mine[1] != mine[0] and len(mine[1]) == 16


def test_neighbours_are_the_training_images_with_the_nearest_features(
    address, folders, digits
):
    held_out, training = digits
    image = held_out[11]
    found = ask(address, "/near", image=sent(image))["runs"]
    for folder, ones in zip(folders, found, strict=True):
        model = mim_jax.load(folder)
        bank, (query,) = model.features(training), model.features(image[None])
        cosine = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        best = np.sort(cosine)[::-1][:5]
        assert [one["similarity"] for one in ones] == pytest.approx(best, abs=1e-5)
        for one, value in zip(ones, best, strict=True):
            (where,) = np.nonzero(
                (training.squeeze() == shown(one["image"])).all((1, 2))
            )
            assert cosine[where].max() == pytest.approx(value, abs=1e-5)
            labels = {str(Digits()[int(i)]["label"]) for i in where}
            assert one["label"] in labels
    # A training image is nearest to itself.
    first = ask(address, "/near", image=sent(training[0]))["runs"][0][0]
    assert first["similarity"] == pytest.approx(1) and "0" <= first["label"] <= "9"
    assert (shown(first["image"]) == training[0].squeeze()).all()


def test_an_upload_is_cropped_as_evaluations_do(address, mae):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 40, 3), np.uint8)
    status, answer = request(address, "/image", png(pixels, "JPEG"))
    found = json.loads(answer)
    assert status == 200 and found["was"] == [60, 40]
    assert shown(found["image"]).shape == (8, 8)
    whole = np.full((8, 8), 37, np.uint8)
    _, answer = request(address, "/image", png(whole))
    assert (shown(json.loads(answer)["image"]) == whole).all()


@pytest.mark.parametrize(
    "name, status, said",
    [
        ("text", 400, "no image of a format of"),
        ("nothing", 400, "no image of a format of"),
        ("bomb", 400, "exceeds limit"),
        ("long", 413, "more than 50,000 bytes"),
        ("claims", 413, "more than 50,000 bytes"),
        ("chunks", 413, "more than 50,000 bytes"),
    ],
)
def test_what_is_no_image_or_too_large_is_refused(address, name, status, said):
    header = b"P5 65000 65000 255\n"  # more than decode takes
    bodies = {"text": b"an image? no", "nothing": b"", "bomb": header}
    bodies |= {"long": b"x" * (MOST + 1), "claims": b"x", "chunks": b""}
    headers, body = {}, bodies[name]
    if name == "claims":
        headers["content_length"] = str(10**15)
    if name == "chunks":  # without a length
        headers = {"content_length": None, "transfer_encoding": "chunked"}
        body = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
        body = body * 2 + b"0\r\n\r\n"
    found, answer = request(address, "/image", body, **headers)
    assert found == status and said in json.loads(answer)["error"], answer


def test_a_question_that_cannot_be_answered_says_why(address, digits):
    image = sent(digits[0][0])
    for path, asked, said in (
        ("/fill", dict(hidden=[]), "0 of 16 patches are hidden"),
        ("/fill", dict(hidden=list(range(16))), "16 of 16 patches are hidden"),
        ("/fill", dict(hidden=[16]), "hidden has '16': want patches of 0 to 15"),
        ("/fill", dict(hidden=[True]), "hidden has 'True'"),
        ("/fill", dict(hidden=3), "not iterable"),
        ("/fill", dict(count=16, unit=1, seed=0), "16 of 16 patches are hidden"),
        ("/fill", dict(count=4, unit=4, seed=0), "covers an image of 8x8"),
        ("/fill", dict(count=4, unit=0, seed=0), "unit=0"),
        ("/fill", dict(count=4.5, unit=1, seed=0), "count is '4.5'"),
        ("/look", dict(patch=-1), "patch has '-1': want patches of 0 to 15"),
        ("/look", dict(image=None), "want the image as base64"),
        ("/near", dict(image="?"), ""),
        ("/near", dict(image=sent(np.zeros((9, 8), np.uint8))), "want [8, 8, 1]"),
    ):
        answer = ask(address, path, 400, **({"image": image} | asked))
        assert said in answer["error"] and answer["error"], answer
    for body, status in ((b"[1]", 400), (b"{", 400), (b"[" * 10**5, 400)):
        assert request(address, "/fill", body)[0] == status
    assert request(address, "/fill", b" " * 10**6)[0] == 413
    assert request(address, "/elsewhere")[0] == 404
    assert request(address, "/../server.py")[0] == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:80"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "localhost@evil.example"},
        {"host": "192.168.0.7:8765"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:1"},  # another program on this machine
        {"origin": "null"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "path, body", [("/", None), ("/about", None), ("/image", b"x")]
)
def test_no_other_page_asks(address, headers, path, body):
    assert request(address, path, body, **headers)[0] == 403


def test_a_request_without_a_host_is_none(address):
    assert request(address, "/about", host=None)[0] == 400


def test_the_page_itself_asks_from_any_name_of_this_machine(address):
    host = address.removeprefix("http://").rstrip("/")
    port = host.partition(":")[2]
    for name in (host, f"localhost:{port}", "localhost:9", "[::1]:9"):
        headers = {"host": name, "origin": f"http://{name}"}
        for site in ("same-origin", "none"):
            assert request(address, "/", sec_fetch_site=site, **headers)[0] == 200
    with urllib.request.urlopen(address) as answer:
        policy = answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "http" not in policy


def test_no_file_of_the_page_names_another_address():
    folder = pathlib.Path(explore.__file__).parent
    texts = {path.name: path.read_text() for path in folder.glob("page.*")}
    assert len(texts) == 3
    for name, text in texts.items():
        assert "//" not in text.replace("// ", ""), name
        # A name of a run or a class is text, and never a tag.
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text


def test_the_server_listens_on_loopback_alone(address):
    table = pathlib.Path("/proc/net/tcp")
    if not table.exists():
        pytest.skip("no /proc/net/tcp: only Linux lists what listens there")
    port = int(address.rstrip("/").rpartition(":")[2])
    rows = [line.split() for line in table.read_text().splitlines()[1:]]
    listening = [row[1] for row in rows if row[3] == "0A"]
    assert [one for one in listening if one.endswith(f":{port:04X}")] == [
        f"0100007F:{port:04X}"
    ]


def test_nothing_that_is_uploaded_is_written(address, folders, tmp_path, digits):
    large = np.random.default_rng(0).integers(0, 256, (150, 150, 3), np.uint8)
    image = sent(digits[0][5])
    ask(address, "/fill", image=image, hidden=[1])  # what compiles, compiles now
    with audit.only_reads(folders[0], tmp_path):
        assert request(address, "/image", png(large, "JPEG"))[0] == 200
        ask(address, "/fill", image=image, hidden=[2])
        ask(address, "/look", image=image, patch=2)
        ask(address, "/near", image=image)
    assert list(tmp_path.iterdir()) == []


def test_two_people_at_once_get_their_own_answers(address, digits):
    def one(number, found):
        image = sent(digits[0][number])
        for patch in (0, 15) * 3:
            look = ask(address, "/look", image=image, patch=patch)["runs"]
            near = ask(address, "/near", image=image)["runs"]
            found.append((look, near))

    def alone(number):
        found = []
        one(number, found)
        return found

    want = {number: alone(number) for number in (0, 1)}
    found = {0: [], 1: []}
    threads = [threading.Thread(target=one, args=item) for item in found.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == want and want[0] != want[1]


def tree_of(folders, **leaves):
    tree = config.read(str(ROOT / "configs/explore.py"))
    tree.runs, tree.bank, tree.port = tuple(map(str, folders)), 50, 0
    tree.update(leaves)
    return tree


def test_the_job_serves_until_it_is_asked_to_end(
    folders, tmp_path, capsys, monkeypatch
):
    seen, serving = [], server.serving

    @contextlib.contextmanager
    def watched(app, port):
        with serving(app, port) as found:
            seen.append(json.loads(request(found, "/about")[1]))
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            yield found
        with pytest.raises(OSError):
            request(found, "/about")

    monkeypatch.setattr(server, "serving", watched)
    before = signal.getsignal(signal.SIGINT)
    job.run(tree_of(folders[:1]), tmp_path / "out")
    assert signal.getsignal(signal.SIGINT) is before
    (about,) = seen
    assert [one["bank"] for one in about["runs"]] == [50]
    assert "open http://127.0.0.1:" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "summary.txt", "lock"}


def test_a_port_that_is_taken_is_told(address, app):
    port = int(address.rstrip("/").rpartition(":")[2])
    with pytest.raises(
        config.ConfigError, match=f"port={port}: .*; want another, or 0"
    ):
        with server.serving(app.asgi, port):
            pass


def test_one_run_or_two_are_explored(folders, tmp_path):
    with pytest.raises(config.ConfigError, match="want one or two run directories"):
        job.run(tree_of([]), tmp_path)
    with pytest.raises(config.ConfigError, match="want one or two run directories"):
        job.run(tree_of([*folders, "runs/third"]), tmp_path)


def test_patches_of_two_sizes_fit_no_common_mask(folders, monkeypatch):
    sides = iter((2, 4))

    def model(one, bank):
        side = next(sides)
        grid = Grid(8 // side, 8 // side, side)
        return types.SimpleNamespace(title=one.run.name, grid=grid)

    monkeypatch.setattr(server, "Model", model)
    runs = loading.load_all(map(str, folders))
    with pytest.raises(config.ConfigError, match="mae has patches of 2 .* of 4: want"):
        server.App(runs, 10, 5, MOST)


def test_without_the_extra_the_error_names_it(folders, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "mim_jax.explore.server")
    monkeypatch.delattr(explore, "server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(config.ConfigError, match=r"pip install 'mim_jax\[explore\]'"):
        job.run(tree_of(folders), tmp_path)
