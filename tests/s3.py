"""A real S3 server for tests: moto's, in a thread, and buckets filled by boto3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

SECRET = "wJalrXUtnFEMIsecretKEY"
KEY = "AKIATESTONLYKEY"


@contextmanager
def s3_server() -> Iterator[str]:
    """Run a server, with the environment set so that every client finds it; yield its address."""
    pytest.importorskip("moto")
    import fsspec
    from moto.server import ThreadedMotoServer

    fsspec.get_filesystem_class("s3").clear_instance_cache()  # those of a server before know its address
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        address = f"http://{host}:{port}"
        for name, value in {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        yield address
    server.stop()


def put(address: str, bucket: str, files: Mapping[str, bytes]) -> None:
    """Store objects in a bucket, which is made where it is missing."""
    import boto3

    client = boto3.client("s3", endpoint_url=address)
    client.create_bucket(Bucket=bucket)
    for name, data in files.items():
        client.put_object(Bucket=bucket, Key=name, Body=data)
    client.close()
