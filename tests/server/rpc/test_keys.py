"""API keys on a real port: who is let in, what a scope permits, what stays hidden."""

import logging

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from heedful_proto.v1 import (
    feedback_pb2,
    inference_pb2,
    inference_pb2_grpc,
    models_pb2,
)
from heedful_server.config import load_config
from heedful_server.security import keyring
from heedful_server.security.method_scopes import METHOD_SCOPES
from heedful_server.serving import Server
from heedful_store import KEY_SCOPES, NewKey, Scope, uuid7

S = grpc.StatusCode
MODULES = (inference_pb2, feedback_pb2, models_pb2)
RPCS = {
    f"/{service.full_name}/{method.name}": method
    for module in MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


@pytest.fixture
def config(config):
    return config.model_copy(update={"auth": config.auth.model_copy(update={"mode": "keys"})})


@pytest.fixture
def make_key(server):
    async def make(*scopes: str, tenant: str = "acme", project: str = "") -> NewKey:
        return await server.feedback.store.create_key(Scope(tenant, project), "test", scopes)

    return make


def bearer(key: NewKey | str) -> tuple[tuple[str, str], ...]:
    text = key if isinstance(key, str) else key.secret
    return (("authorization", f"Bearer {text}"),)


def tokenize(stub, metadata=()):
    return stub.Tokenize(inference_pb2.TokenizeRequest(text="hello"), metadata=metadata)


async def failure(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


def test_every_rpc_has_a_scope_that_keys_can_have():
    assert METHOD_SCOPES.keys() == RPCS.keys()
    scopes = {scope for value in METHOD_SCOPES.values() for scope in value.split(" or ")}
    assert scopes - {""} <= KEY_SCOPES


@pytest.mark.parametrize("method", RPCS)
async def test_no_rpc_answers_without_a_key_or_its_scope(method, channel, make_key):
    make = channel.unary_stream if RPCS[method].server_streaming else channel.unary_unary

    async def outcome(metadata) -> tuple[grpc.StatusCode, str]:
        call = make(method)(b"", metadata=metadata)
        if RPCS[method].server_streaming:
            return await failure(call.read())
        return await failure(call)

    code, message = await outcome(())
    assert code is S.UNAUTHENTICATED
    assert "authorization" in message
    scope = METHOD_SCOPES[method]
    if scope:
        code, message = await outcome(bearer(await make_key("admin")))
        assert code is S.PERMISSION_DENIED
        assert all(repr(part) in message for part in scope.split(" or "))


@pytest.mark.parametrize(
    "header", ["Bearer hk_0123456789ab_secret", "Bearer ", "Basic dTpw", "hk_", "Bearer hk_%_x"]
)
async def test_key_that_never_was_is_unauthenticated(header, stub):
    code, message = await failure(tokenize(stub, (("authorization", header),)))
    assert (code, message) == (S.UNAUTHENTICATED, "the API key is not valid")


async def test_right_prefix_with_a_wrong_secret_is_unauthenticated(stub, make_key):
    key = await make_key("generate")
    wrong = f"{key.secret[:-4]}AAAA"
    assert (await failure(tokenize(stub, bearer(wrong))))[0] is S.UNAUTHENTICATED


async def test_key_with_the_scope_is_let_in_under_both_names(stub, make_key):
    key = await make_key("generate")
    assert (await tokenize(stub, bearer(key))).token_ids
    assert (await tokenize(stub, (("x-api-key", key.secret),))).token_ids


async def test_any_feedback_includes_ones_own(feedback_stub, make_key):
    key = await make_key("feedback:any")
    request = feedback_pb2.GetFeedbackRequest(feedback_id=uuid7())
    code, _ = await failure(feedback_stub.GetFeedback(request, metadata=bearer(key)))
    assert code is S.NOT_FOUND


async def test_revoked_key_ends_within_the_stated_time(stub, make_key, server, monkeypatch):
    key = await make_key("generate")
    await tokenize(stub, bearer(key))
    await server.feedback.store.revoke_key("acme", key.key.key_id)
    monkeypatch.setattr(keyring, "CACHE_S", 0.0)
    code, message = await failure(tokenize(stub, bearer(key)))
    assert (code, message) == (S.UNAUTHENTICATED, "the API key is not valid")


async def test_another_tenants_ids_look_like_unknown_ones(stub, feedback_stub, make_key, said):
    scopes = ("generate", "feedback:any")
    mine, theirs = await make_key(*scopes), await make_key(*scopes, tenant="rival")
    sampling = inference_pb2.SamplingParams(max_tokens=4)
    consent = inference_pb2.Consent(log=inference_pb2.LOG_CONSENT_FULL)
    request = inference_pb2.GenerateRequest(
        prompt=inference_pb2.Prompt(text="hello"), sampling=sampling, consent=consent
    )
    answer = (await stub.Generate(request, metadata=bearer(mine))).completions[0]
    event = said(answer)
    await feedback_stub.SubmitFeedback(
        feedback_pb2.SubmitFeedbackRequest(event=event), metadata=bearer(mine)
    )

    def completion(id: str, token: str, key: NewKey):
        request = inference_pb2.GetCompletionRequest(completion_id=id, completion_token=token)
        return stub.GetCompletion(request, metadata=bearer(key))

    def feedback(id: str, token: str, key: NewKey):
        request = feedback_pb2.GetFeedbackRequest(feedback_id=id, token=token)
        return feedback_stub.GetFeedback(request, metadata=bearer(key))

    for read, id in ((completion, answer.completion_id), (feedback, event.feedback_id)):
        await read(id, "", mine)
        unknown_id = uuid7()
        for token in ("", answer.completion_token):
            code, message = await failure(read(id, token, theirs))
            unknown = await failure(read(unknown_id, token, theirs))
            assert code is S.NOT_FOUND
            assert (code, message.replace(id, "ID")) == (
                unknown[0],
                unknown[1].replace(unknown_id, "ID"),
            )


async def test_key_of_one_project_is_refused_elsewhere(feedback_stub, make_key):
    key = await make_key("feedback:any", project="app")
    request = feedback_pb2.ListFeedbackRequest(project="other")
    code, _ = await failure(feedback_stub.ListFeedback(request, metadata=bearer(key)))
    assert code is S.NOT_FOUND
    request = feedback_pb2.ListFeedbackRequest(project="app")
    await feedback_stub.ListFeedback(request, metadata=bearer(key))


async def test_health_and_reflection_need_no_key(channel):
    reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    assert await reflected(channel)


async def reflected(channel) -> list[str]:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async for reply in stub.ServerReflectionInfo(iter([request])):
        return [service.name for service in reply.list_services_response.service]
    return []


async def test_reflection_can_be_switched_off(config, model, make_engine):
    grpc_settings = config.grpc.model_copy(update={"reflection": False})
    server = Server(config.model_copy(update={"grpc": grpc_settings}), model, make_engine)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await reflected(channel)
            assert caught.value.code() is S.UNIMPLEMENTED
    finally:
        await server.stop(0.0)


async def test_first_key_closes_a_server_that_was_open(
    config, model, make_engine, tmp_path, monkeypatch
):
    auto = config.model_copy(update={"auth": config.auth.model_copy(update={"mode": "auto"})})
    server = Server(auto, model, make_engine)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            await tokenize(stub)
            store = server.feedback.store
            key = await store.create_key(Scope("acme", ""), "first", ["generate"])
            monkeypatch.setattr(keyring, "CACHE_S", 0.0)
            assert (await failure(tokenize(stub)))[0] is S.UNAUTHENTICATED
            await tokenize(stub, bearer(key))
            await store.revoke_key("acme", key.key.key_id)
            assert (await failure(tokenize(stub)))[0] is S.UNAUTHENTICATED
    finally:
        await server.stop(0.0)
    # Neither a restart nor the loss of the last key opens it again.
    again = Server(auto, model, make_engine)
    assert again.keyring.is_closed
    await again.feedback.close()


async def test_secrets_reach_no_log(stub, make_key, server, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    key = await make_key("generate")
    await tokenize(stub, bearer(key))
    await failure(tokenize(stub, bearer(f"{key.secret}x")))
    await failure(stub.Generate(inference_pb2.GenerateRequest(), metadata=bearer(key)))
    secret = key.secret.split("_", 2)[2]
    out, err = capfd.readouterr()
    assert secret not in caplog.text + out + err


async def test_metrics_are_open_on_loopback(server):
    async with httpx.AsyncClient() as client:
        reply = await client.get(f"http://{server.http_address}/metrics")
    assert reply.status_code == 200


async def test_metrics_beyond_loopback_need_a_key_for_admin(config, model, make_engine):
    http = config.http.model_copy(update={"host": "0.0.0.0"})
    exposed = config.model_copy(update={"http": http, "insecure": True})
    server = Server(exposed, model, make_engine)
    await server.start()
    try:
        port = server.http_address.rpartition(":")[2]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            assert (await client.get("/metrics")).status_code == 401
            for scope, status in (("generate", 403), ("admin", 200)):
                key = await server.feedback.store.create_key(Scope("acme", ""), "", [scope])
                headers = {"Authorization": f"Bearer {key.secret}"}
                assert (await client.get("/metrics", headers=headers)).status_code == status
            assert (await client.get("/healthz")).status_code == 200
    finally:
        await server.stop(0.0)


def test_keys_are_always_needed_beyond_loopback_unless_insecure_or_switched_off():
    def rule(**settings: str) -> str:
        given = [(path.replace("__", "."), value) for path, value in settings.items()]
        return load_config(None, {}, given).key_rule

    assert rule() == "once_one_exists"
    encrypted = {"tls__cert_file": "c.pem", "tls__key_file": "k.pem"}
    assert rule(grpc__host="0.0.0.0", **encrypted) == "always"
    assert rule(auth__mode="keys") == "always"
    assert rule(auth__mode="none") == "never"
    assert rule(grpc__host="0.0.0.0", insecure="true") == "once_one_exists"
