import pytest
from heedful_store import Invalid, NotFound, Project, Scope, Store, now_ms
from sqlalchemy import text

APP = Scope("acme", "support")


def test_a_key_opens_what_it_was_made_for(store: Store) -> None:
    made = store.create_key(APP, "backend", ["generate", "feedback:any"]).result()
    assert made.secret.startswith(f"hk_{made.key.prefix}_")
    found = store.verify_key(made.secret)
    assert found == made.key
    assert found.scope == APP
    assert found.scopes == {"generate", "feedback:any"}


def test_the_secret_is_nowhere_in_the_database(store: Store) -> None:
    made = store.create_key(APP, "backend", ["generate"]).result()
    secret = made.secret.split("_", 2)[2]
    with store.read() as connection:
        rows = str(connection.execute(text("SELECT * FROM api_keys")).all())
    assert made.key.prefix in rows
    assert secret not in rows


def test_anything_else_is_no_key(store: Store) -> None:
    made = store.create_key(APP, "backend", ["generate"]).result()
    other = store.create_key(APP, "backend", ["generate"]).result()
    mixed = f"hk_{made.key.prefix}_{other.secret.split('_', 2)[2]}"
    wrong = [
        mixed,
        made.secret[:-1],
        made.secret + "A",
        made.secret.upper(),
        f"hk_{made.key.prefix}_",
    ]
    for text_ in (*wrong, "", "hk", "hk__", "hk_nothing_here", "Bearer x", "hk_\N{SNOWMAN}_x"):
        assert store.verify_key(text_) is None


def test_a_revoked_or_expired_key_is_no_key(store: Store) -> None:
    made = store.create_key(APP, "a", ["generate"]).result()
    with pytest.raises(NotFound):
        store.revoke_key("other", made.key.key_id).result()
    assert store.verify_key(made.secret) is not None
    revoked = store.revoke_key("acme", made.key.key_id).result()
    assert store.verify_key(made.secret) is None
    assert store.revoke_key("acme", made.key.key_id).result() == revoked
    late = store.create_key(APP, "b", ["generate"], expires_at_ms=now_ms() - 1).result()
    assert store.verify_key(late.secret) is None


def test_keys_are_listed_by_tenant_and_project(store: Store) -> None:
    keys = [
        store.create_key(scope, "k", ["train"]).result().key
        for scope in (APP, Scope("acme", "sales"), Scope("other", "support"))
    ]
    assert store.list_keys("acme") == keys[:2]
    assert store.list_keys("acme", "sales") == keys[1:2]


def test_an_unknown_scope_is_refused(store: Store) -> None:
    with pytest.raises(Invalid, match="root"):
        store.create_key(APP, "k", ["generate", "root"]).result()


def test_projects_are_made_changed_and_found(store: Store) -> None:
    with pytest.raises(NotFound):
        store.get_project(APP)
    store.put_project(Project(APP, "public", 30, {"a": 1})).result()
    first = store.get_project(APP)
    store.put_project(Project(APP, "team")).result()
    second = store.get_project(APP)
    assert (first.profile, first.retention_days, first.settings) == ("public", 30, {"a": 1})
    assert (second.profile, second.retention_days, second.settings) == ("team", None, {})
    assert first.created_at_ms == second.created_at_ms
    assert [project.scope for project in store.list_projects()] == [APP, Scope()]
    assert store.list_projects("acme") == [second]
