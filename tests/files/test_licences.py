"""Licences by metadata, front matter and text; what names none is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditmoe_cli.files.licences import UNKNOWN, licence_in_folder, licence_in_metadata, licence_in_text

MIT = "MIT License\n\nPermission is hereby granted, free of charge, to any person obtaining a\ncopy of this software"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (MIT, "mit"),
        ("  Apache License\n  Version 2.0, January 2004", "apache-2.0"),
        ("GNU GENERAL PUBLIC LICENSE\nVersion 3, 29 June 2007", "gpl-3.0"),
        ("GNU GENERAL PUBLIC LICENSE\n Version 2, June 1991", "gpl-2.0"),
        ("Redistribution and use in source and binary forms, with", "bsd-2-clause"),
        ("Redistribution and use in source and binary forms\nNeither the name of X", "bsd-3-clause"),
        ("Creative Commons Legal Code\nAttribution-NonCommercial 4.0 International", "cc-by-nc-4.0"),
        ("Attribution-NonCommercial-ShareAlike 4.0 International\n… Creative Commons Corporation", "cc-by-nc-sa-4.0"),
        ("Creative Commons Attribution 4.0 International Public License", "cc-by-4.0"),
        ("CC0 1.0 Universal", "cc0-1.0"),
        ("CreativeML Open RAIL++-M License", "openrail++"),
        ("You may do this and that.", UNKNOWN),
    ],
)
def test_a_text_is_known_by_what_only_it_holds(text: str, name: str) -> None:
    assert licence_in_text(text) == name


def test_metadata_names_a_licence_under_usual_keys() -> None:
    assert licence_in_metadata({"license": "mit"}) == licence_in_metadata({"modelspec.license": "mit"}) == "mit"
    assert licence_in_metadata({"license": "<script>"}) is None and licence_in_metadata({"format": "pt"}) is None


def test_front_matter_counts_before_texts(tmp_path: Path) -> None:
    assert licence_in_folder(tmp_path) is None
    (tmp_path / "LICENSE").write_text(MIT)
    assert licence_in_folder(tmp_path) == ("mit", tmp_path / "LICENSE")
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model\n")
    assert licence_in_folder(tmp_path) == ("cc-by-nc-4.0", tmp_path / "README.md")
    for broken in ("---\nlicense: [a]\n---\n", "---\n&\n---\n", "no front matter", "---\n- a\n---\n"):
        (tmp_path / "README.md").write_text(broken)
        assert licence_in_folder(tmp_path) == ("mit", tmp_path / "LICENSE")
    (tmp_path / "LICENSE").write_bytes(b"\xff\xfe")
    assert licence_in_folder(tmp_path) is None
