"""The build: a name that follows the sources, and a clear line where there is no compiler."""

import pytest
from heedful_kernels.cpu import build, library_path


def test_the_library_s_name_follows_the_sources(tmp_path, monkeypatch):
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "a.cpp").write_text("int a;")
    monkeypatch.setattr(library_path, "SOURCES", sources)
    monkeypatch.setattr(library_path, "LIBRARIES", tmp_path)
    first = library_path.library_path()
    first.touch()
    assert library_path.find_library() == first
    (sources / "a.cpp").write_text("int b;")
    assert library_path.find_library() is None


def test_without_a_compiler_the_build_says_so_and_succeeds(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(library_path, "LIBRARIES", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert build.main() == 0
    assert "no compiler: torch operators will be used" in capsys.readouterr().out


def test_cxx_is_preferred(monkeypatch, tmp_path):
    compiler = tmp_path / "my-cxx"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert build.find_compiler() == str(compiler)


def test_a_failing_compiler_s_words_are_passed_on(monkeypatch, tmp_path):
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho cannot compile this >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "LIBRARIES", tmp_path / "lib")
    with pytest.raises(RuntimeError, match="cannot compile this"):
        build.build(str(compiler))
