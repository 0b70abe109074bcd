"""Names of shards: what is a part of a key, what is a pattern, and what is only hidden when it is printed."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distgan.data.storage import locations
from distgan.errors import UserError
from tests.shards import refusal

FOLDERS = ("/data/a b", "s3://bucket/run#1", "abfs://container@account.dfs.core.windows.net/x?y", "https://host/a%23b")
NAMES = st.lists(
    st.text(st.characters(exclude_characters="/", exclude_categories=("Cc", "Cs")), min_size=1, max_size=12),
    min_size=1,
    max_size=3,
).map("/".join)


@pytest.mark.parametrize("folder", FOLDERS)
@given(name=NAMES)
@example(name="epoch#2.tar")
@example(name="a?b=c.tar")
@example(name="100%.tar")
@example(name="a%23b/ü *[1]{2}.tar")
def test_a_name_in_a_folder_is_that_name_again(folder: str, name: str) -> None:
    url = locations.join(folder, name)
    assert locations.relative_name(url, folder) == name
    assert locations.is_inside(url, folder)
    assert locations.folder_of(locations.join(folder, name.replace("/", "|"))) == folder
    assert locations.common_folder([url, locations.join(folder, "~")]) == folder
    if locations.is_http(folder):
        parts = urlsplit(url)
        assert (parts.query, parts.fragment) == ("", "")
    else:
        assert url == f"{folder}/{name}"


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("S3://Bucket/Run#1/a?b.tar", "s3://Bucket/Run#1/a?b.tar"),
        ("s3://bucket/q[1]/%20.tar/", "s3://bucket/q[1]/%20.tar"),
        ("GS://b/x", "gs://b/x"),
        ("HTTPS://host/a b/ü.tar?t=a b/", "https://host/a%20b/%C3%BC.tar?t=a b/"),
        ("http://host/a%23b.tar", "http://host/a%23b.tar"),
        ("http://host/{000..003}.tar", "http://host/{000..003}.tar"),
    ],
)
def test_one_name_for_each_place(url: str, meant: str) -> None:
    assert locations.normalize(url) == meant == locations.normalize(meant)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://host/epoch#2.tar", "%23"),
        ("http://host:port/a.tar", "invalid URL"),
        ("http://[host/a.tar", "invalid URL"),
        ("s3://", "no bucket"),
        ("s3://*/a.tar", "no bucket"),
        ("s3://bucket/a.tar?versionId=3", "versionId"),
        ("a://b::s3://c", "unsupported kind of URL"),
    ],
)
def test_names_that_mean_no_one_file_are_refused(url: str, said: str) -> None:
    assert said in refusal(locations.normalize, url)


def test_the_query_of_an_http_url_belongs_to_each_file_of_a_folder() -> None:
    folder = locations.normalize("https://user:word@host/data?sig=S")
    shard = locations.join(folder, "a.tar")
    assert shard == "https://user:word@host/data/a.tar?sig=S"
    assert locations.folder_of(shard) == folder
    assert locations.relative_name(shard, folder) == "a.tar"
    other = "https://user:word@host/data/b.tar?sig=T"
    assert locations.common_folder([shard, other]) == "https://user:word@host/data"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:word@host/a.tar?sig=word", "https://host/a.tar"),
        ("https://word@host/a.tar", "https://host/a.tar"),
        ("ftp://user:word@host/a.tar?sig=word#word", "ftp://host/a.tar"),
        ("hdfs://user:word@host/a?b.tar", "hdfs://host/a?b.tar"),
        ("abfs://container@account/a#b.tar", "abfs://container@account/a#b.tar"),
        ("s3://bucket/a?b@c:d.tar", "s3://bucket/a?b@c:d.tar"),
        ("/a?b#c.tar", "/a?b#c.tar"),
    ],
)
def test_only_secrets_are_left_out_of_messages(url: str, shown: str) -> None:
    assert locations.public_name(url) == shown


def test_an_empty_path() -> None:
    with pytest.raises(UserError, match="empty"):
        locations.normalize(" ")
