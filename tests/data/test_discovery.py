"""Tests discovery: paths, patterns and tables give complete subjects, in order, each under one id."""

import os
import re
from pathlib import Path

import pytest

from voxquilt.data.discovery import SubjectFiles, find_cases, stem
from voxquilt.errors import ConfigError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def found(inputs: object, images: dict[str, str] | None = None) -> dict[str, dict[str, str]]:
    """Paths by subject and image name, in order."""
    return {case.subject: {n: str(p) for n, p in case.images.items()} for case in find_cases(inputs, images)}


def test_a_file_is_one_subject_named_after_it() -> None:
    """The id is the file's name without .nii.gz, in any case and with any dots before it."""
    touch("scans/sub.01.NII.GZ")
    assert found("scans/sub.01.NII.GZ") == {"sub.01": {"image": "scans/sub.01.NII.GZ"}}
    assert find_cases(Path("scans/sub.01.NII.GZ")) == [SubjectFiles("sub.01", {"image": Path("scans/sub.01.NII.GZ")})]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".hdr", ".img", ".hdr.gz", ".img.gz"])
def test_every_nifti_extension_is_known(suffix: str) -> None:
    """A folder with one file of each kind."""
    touch(f"scans/a{suffix}")
    assert list(found("scans")) == ["a"]
    assert stem(f"deep/er/a{suffix}") == "a"


def test_a_folder_gives_its_images_in_the_order_of_their_ids() -> None:
    """Other files, hidden and temporary ones, and subfolders are ignored, even one with the name of an image."""
    touch("s/b.nii", "s/a.nii.gz", "s/10.nii", "s/9.nii", "s/.b.nii.gz.123.tmp", "s/.hidden.nii", "s/notes.txt")
    touch("s/deeper/c.nii", "s/folder.nii/d.nii", "s/a.json", "s/nii")
    assert list(found("s")) == ["10", "9", "a", "b"]


def test_a_pattern_gives_the_files_that_it_matches() -> None:
    """* stays in a folder, ** descends into all, [...] is a class; folders and files of other kinds are left out."""
    touch("s/a.nii.gz", "s/b.nii.gz", "s/b.txt", "s/x/c.nii.gz", "s/x/y/d.nii.gz")
    Path("s/e.nii.gz").mkdir()
    assert list(found("s/*.nii.gz")) == ["a", "b"]
    assert list(found("s/*")) == ["a", "b"]
    assert list(found("s/**/*.nii.gz")) == ["a", "b", "c", "d"]
    assert list(found("s/[b-c].nii.gz")) == ["b"]
    assert list(found("s/?/*.nii.gz")) == ["c"]


def test_an_existing_path_with_magic_characters_is_not_a_pattern() -> None:
    """A folder called [1] is that folder, not the pattern for one digit."""
    touch("[1]/a.nii", "1/b.nii")
    assert list(found("[1]")) == ["a"]
    assert list(found("[1]/a.nii")) == ["a"]


def test_a_list_gives_the_subjects_of_all_its_entries() -> None:
    """Files, folders, patterns and tables may be mixed; all ids are sorted together."""
    touch("z.nii", "folder/y.nii", "glob/x1.nii", "glob/x2.nii", "t/w.nii")
    Path("t/table.csv").write_text("image\nw.nii\n")
    assert list(found(["z.nii", "folder", "glob/x*", "t/table.csv"])) == ["w", "x1", "x2", "y", "z"]
    assert list(found(("z.nii",))) == ["z"]


def test_ids_are_never_read_as_numbers() -> None:
    """001 does not become 1, 10_1 not 101, 1e3 not 1000; from files, tables and patterns."""
    ids = ["001", "10_1", "1e3", "1_000", "no", "null"]
    touch(*[f"s/{name}.nii" for name in ids], *[f"p/{name}/t1.nii" for name in ids])
    Path("t.csv").write_text("subject,image\n" + "".join(f"{name},s/{name}.nii\n" for name in ids))
    for got in (found("s"), found("t.csv"), found("p", {"t1": "{subject}/t1.nii"})):
        assert sorted(got) == sorted(ids)


def test_unicode_and_spaces_are_kept() -> None:
    """In folders, files, ids and patterns."""
    touch("méd images/Zoë ß 脳.nii.gz")
    assert found("méd images") == {"Zoë ß 脳": {"image": "méd images/Zoë ß 脳.nii.gz"}}
    assert found("méd images", {"t1": "{subject} 脳.nii.gz"}) == {"Zoë ß": {"t1": "méd images/Zoë ß 脳.nii.gz"}}


def test_a_header_file_and_its_voxel_file_are_one_subject() -> None:
    """a.hdr and a.img are one volume; b.img alone is listed, and its reader names the missing file."""
    touch("s/a.hdr", "s/a.img", "s/b.img", "s/c.hdr.gz", "s/c.img.gz")
    expected = {"a": {"image": "s/a.hdr"}, "b": {"image": "s/b.img"}, "c": {"image": "s/c.hdr.gz"}}
    assert found("s") == expected == found("s/*")
    assert found("s/a.img") == {"a": {"image": "s/a.img"}}


def test_the_home_folder_may_be_written_as_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the shell does not expand ~; ~name without such a user is an ordinary name."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    touch("home/a.nii", "home/p/b/t1.nii", "~nobody-here/c.nii")
    Path("t.csv").write_text("image\n~/a.nii\n")
    a = {"a": {"image": str(tmp_path / "home/a.nii")}}
    assert found("~/a.nii") == found("~/*.nii") == found("~") == found("t.csv") == a
    assert found(None, {"t1": "~/p/{subject}/t1.nii"}) == {"b": {"t1": str(tmp_path / "home/p/b/t1.nii")}}
    assert list(found("~nobody-here")) == ["c"]


# Tables


def test_relative_paths_in_a_table_start_at_its_folder() -> None:
    """Absolute ones are unchanged; no file has to exist."""
    Path("t").mkdir()
    Path("t/table.csv").write_text("subject,t1,flair\ns1,../x/t1.nii, /abs/flair.nii\n")
    assert found("t/table.csv") == {"s1": {"t1": "t/../x/t1.nii", "flair": "/abs/flair.nii"}}


def test_a_tables_columns_are_images_in_their_order() -> None:
    """The column `subject` may be anywhere; the others are the network's input channels in this order."""
    Path("t.csv").write_text("zz,subject,aa\n1.nii,id,2.nii\n")
    (case,) = find_cases("t.csv")
    assert case == SubjectFiles("id", {"zz": Path("1.nii"), "aa": Path("2.nii")})
    assert list(case.images) == ["zz", "aa"]


def test_without_ids_a_tables_subjects_are_named_after_their_first_image() -> None:
    """The id is the stem of the first image column."""
    Path("t.csv").write_text("t1,t2\nx/b.nii.gz,x/c.nii.gz\nx/a.nii.gz,x/c.nii.gz\n")
    assert list(found("t.csv")) == ["a", "b"]


def test_a_table_from_a_spreadsheet_is_read() -> None:
    """With a byte order mark, Windows line ends, blank lines, quotes, and spaces around cells."""
    text = '\ufeffsubject , image\r\n\r\n" s1 ", "my, file.nii"\r\n   001,b.nii  \r\n'
    Path("t.CSV").write_bytes(text.encode())
    assert found("t.CSV") == {"001": {"image": "b.nii"}, "s1": {"image": "my, file.nii"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("subject,t1,t2\na,1.nii,2.nii\n\nb,3.nii,\n", r"t\.csv, line 4: it needs a value for each of subject, t1, t2"),
        ("subject,t1,t2\na,1.nii\n", "line 2"),
        ("subject,t1\n ,1.nii\n", "line 2"),
        ("t1\n1.nii,2.nii\n", "line 2"),
        ("t1,t2\n", "a table needs a header"),
        ("", "a table needs a header"),
        ("subject\na\n", "a column per image"),
        ("t1,t1\n1.nii,2.nii\n", "a column per image"),
        ("subject;t1\na;1.nii\n", r"separated by commas here; its first line is 'subject;t1'"),
        ("subject\tt1\na\t1.nii\n", r"separated by commas here"),
    ],
)
def test_a_missing_cell_is_an_error_that_names_the_line(text: str, message: str) -> None:
    """No subject is dropped silently, and the line number is the one that an editor shows."""
    Path("t.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        find_cases("t.csv")


def test_a_table_that_is_not_utf_8_is_an_error() -> None:
    """Latin-1 would give wrong names."""
    Path("t.csv").write_bytes("image\nZoë.nii\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"t\.csv is not a \.csv in UTF-8"):
        find_cases("t.csv")


# Patterns with {subject}


def test_patterns_collect_the_images_of_a_subject() -> None:
    """Images keep the configured order; files that do not match are ignored."""
    touch("raw/s1/t1.nii", "raw/s1/fl.nii", "raw/s2/t1.nii", "raw/s2/fl.nii", "raw/readme", "raw/s3/other.nii")
    got = found("raw", {"flair": "{subject}/fl.nii", "t1": "{subject}/t1.nii"})
    assert got == {s: {"flair": f"raw/{s}/fl.nii", "t1": f"raw/{s}/t1.nii"} for s in ("s1", "s2")}
    assert [list(images) for images in got.values()] == [["flair", "t1"]] * 2
    assert list(found(None, {"t1": "raw/{subject}/t1.nii"})) == ["s1", "s2"]
    assert list(found(None, {"t1": "raw/../raw/./{subject}/t1.nii"})) == ["s1", "s2"]


def test_a_repeated_subject_placeholder_matches_the_same_id() -> None:
    """sub-a/sub-a_t1 matches, sub-a/sub-b_t1 does not; of several possible ids the shortest is taken."""
    touch("sub-a/sub-a_t1.nii", "sub-c/sub-d_t1.nii", "xx.nii", "xyxy.nii", "xyx.nii")
    assert found(None, {"t1": "sub-{subject}/sub-{subject}_t1.nii"}) == {"a": {"t1": "sub-a/sub-a_t1.nii"}}
    assert list(found(None, {"t1": "{subject}{subject}.nii"})) == ["x", "xy"]


def test_a_subject_that_lacks_an_image_is_still_listed() -> None:
    """It is found by its other images, and its reader names the missing file."""
    touch("a/t1.nii", "b/t2.nii", "c/t1.nii", "c/t2.nii")
    got = found(None, {"t1": "{subject}/t1.nii", "t2": "{subject}/t2.nii"})
    assert list(got) == ["a", "b", "c"]
    assert got["a"] == {"t1": "a/t1.nii", "t2": "a/t2.nii"}


def test_only_the_subject_placeholder_varies_in_a_subject_pattern() -> None:
    """Brackets and stars in folder names are literal, and so are dots."""
    touch("[x]*/a_t1.nii", "x1/b_t1.nii", "[x]*/c_t1xnii")
    assert list(found("[x]*", {"t1": "{subject}_t1.nii"})) == ["a"]


def test_a_subject_placeholder_does_not_match_a_slash() -> None:
    """It is one folder or a part of a name; hidden folders are not subjects."""
    touch("a/x/t1.nii", "b/t1.nii", ".c/t1.nii")
    assert list(found(None, {"t1": "{subject}/t1.nii"})) == ["b"]


# Errors


def test_two_subjects_with_one_id_are_refused_and_both_files_named() -> None:
    """Their outputs would overwrite each other."""
    touch("s/a.nii", "s/a.nii.gz", "x/a.nii")
    for inputs in ("s", ["s/a.nii", "x/a.nii"], ["x", "x/a.nii"], "*/a.nii"):
        with pytest.raises(ConfigError, match=r"two subjects have the id 'a': .*a\.nii.* and .*a\.nii"):
            find_cases(inputs)
    with pytest.raises(ConfigError, match=r"s/a\.nii and s/a\.nii\.gz"):
        find_cases("s")
    Path("t.csv").write_text("subject,image\n7,1.nii\n8,2.nii\n7,3.nii\n")
    with pytest.raises(ConfigError, match=r"'7': 1\.nii and 3\.nii"):
        find_cases("t.csv")


@pytest.mark.parametrize("name", ["a/b", "../a", "/a", "a;b"])
def test_ids_that_cannot_be_file_names_are_refused(name: str) -> None:
    """Ids become file names, not paths, and a manifest separates names by semicolons."""
    Path("t.csv").write_text(f"subject,image\n{name},1.nii\n")
    with pytest.raises(ConfigError, match=f"'{name}' cannot be an id"):
        find_cases("t.csv")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("nowhere", "there is no file or folder nowhere"),
        ("nowhere.nii.gz", "there is no file or folder nowhere.nii.gz"),
        ("empty", "the folder empty has no image file"),
        ("empty/*.nii", r"no image file matches empty/\*\.nii"),
        ("*", r"no image file matches \*"),
        ([], "is an empty list"),
        (None, "data.inputs is missing"),
        (["empty/..", "nowhere"], "no image file"),
    ],
)
def test_an_entry_without_files_is_an_error_that_says_where_it_looked(inputs: object, message: str, here: Path) -> None:
    """Every entry must match, also in a list whose other entries do."""
    touch("empty/notes.txt")
    with pytest.raises(ConfigError, match=message) as caught:
        find_cases(inputs)
    assert inputs in (None, []) or str(here) in str(caught.value)


@pytest.mark.parametrize("images", [None, {"t1": "t1_{subject}.nii"}])
@pytest.mark.parametrize("inputs", ["", ["", "."]])
def test_no_name_is_not_the_folder_one_stands_in(inputs: object, images: object) -> None:
    """As in `data.inputs=$SCANS` of a variable that is not set."""
    touch("t1_a.nii")
    with pytest.raises(ConfigError, match=r"data\.inputs names no file or folder"):
        find_cases(inputs, images)


@pytest.mark.parametrize("entry", [1000.0, 8, True, {"a": "b"}])
def test_an_entry_that_is_not_a_string_is_refused(entry: object) -> None:
    """Hydra reads 1e3 as a number; the message shows how to quote it."""
    for inputs in ([entry], entry if not isinstance(entry, dict) else [entry]):
        with pytest.raises(ConfigError, match=r"is \w+, not a path; quote it"):
            find_cases(inputs)


@pytest.mark.parametrize(
    ("inputs", "images", "message"),
    [
        (None, {"t1": "x/t1.nii"}, r"data\.images\.t1 needs \{subject\}"),
        (None, {"t1": 3}, r"data\.images\.t1 needs \{subject\}"),
        (None, "{subject}/t1.nii", "data.images must be a mapping"),
        (None, ["{subject}/t1.nii"], "data.images must be a mapping"),
        (None, {"t1": "{subject}/t1.nii"}, "no file matches"),
        ("a.nii", {"t1": "{subject}/t1.nii"}, "data.inputs must be the folder that they lie in"),
        (["."], {"t1": "{subject}/t1.nii"}, "data.inputs must be the folder that they lie in"),
        (7, {"t1": "{subject}/t1.nii"}, "data.inputs must be the folder that they lie in"),
    ],
)
def test_invalid_subject_patterns_are_refused(inputs: object, images: object, message: str) -> None:
    """A pattern needs {subject}, a folder to start from, and a match."""
    touch("a.nii")
    with pytest.raises(ConfigError, match=message):
        find_cases(inputs, images)


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [("scasn", "scans"), ("scans/hed1.nii.gz", "scans/head1.nii.gz"), ("scnas/head1.nii.gz", "scans"), ("x/y/z", None)],
)
def test_a_misspelt_path_is_answered_with_the_nearest_existing_one(
    tmp_path: Path, typed: str, wanted: str | None
) -> None:
    """At the first part of the path that does not exist; nothing is suggested if no name is close."""
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans/head1.nii.gz").touch()
    with pytest.raises(ConfigError) as error:
        find_cases(str(tmp_path / typed))
    assert str(error.value).endswith(f"Did you mean {tmp_path / wanted}?" if wanted else ").")


# Files in the output folder


def ids(inputs: object, output_dir: str, images: dict[str, str] | None = None) -> list[str]:
    return [case.subject for case in find_cases(inputs, images, output_dir=output_dir)]


@pytest.mark.parametrize("output", ["in/out", "in/../in/./out/", "linked", "absolute", "~/in/out"])
def test_files_in_the_output_folder_are_never_inputs(
    output: str, here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By folder, pattern and {subject}, also through links; a log message names the files left out."""
    touch("in/a.nii.gz", "in/b/t1.nii.gz", "in/out/a_labels.nii.gz", "in/out/t1.nii.gz", "in/out/deeper/c.nii.gz")
    Path("in/link.nii.gz").symlink_to("out/a_labels.nii.gz")
    Path("linked").symlink_to("in/out")
    Path("in/by").symlink_to("out")
    monkeypatch.setenv("HOME", str(here))
    output = str(here / "in/out") if output == "absolute" else output
    assert ids("in", output) == ids("in/*.nii.gz", output) == ids(["in"], output) == ["a"]
    assert ids("in/**/*.nii.gz", output) == ids("./in/../in/**/*", output) == ["a", "t1"]
    assert ids("in", output, {"t1": "{subject}/t1.nii.gz"}) == ["b"]
    assert ids("in", "in/other") == ["a", "link"]
    assert any(
        "left out, since outputs are not inputs: a_labels.nii.gz" in record.getMessage() for record in caplog.records
    )


def test_an_output_folder_may_contain_the_input_folder() -> None:
    """A run writes beside the input folder, never into it."""
    touch("work/in/a.nii.gz", "work/in/b/c.nii.gz", "work/a_labels.nii.gz")
    assert ids("work/in", "work") == ["a"]
    assert ids("work/in/**/*.nii.gz", "work") == ["a", "c"]
    assert ids("work/in/a.nii.gz", "work") == ["a"]
    assert ids("work/in", "work", {"t1": "{subject}/c.nii.gz"}) == ["b"]
    assert ids("work/in", ".") == ["a"]


def test_an_input_named_inside_the_output_folder_is_refused() -> None:
    """It is not left out silently: by path, list, table or pattern, or if the folder itself is named."""
    touch("in/a.nii.gz", "out/a_labels.nii.gz")
    Path("in/link.nii.gz").symlink_to("../out/a_labels.nii.gz")
    Path("t.csv").write_text("subject,t1,prior\na,in/a.nii.gz,out/a_labels.nii.gz\n")
    for inputs in ("out/a_labels.nii.gz", ["in/a.nii.gz", "in/../out/a_labels.nii.gz"], "t.csv", "in/link.nii.gz"):
        with pytest.raises(ConfigError, match=r"\.nii\.gz lies in output_dir=out, whose files are never inputs"):
            find_cases(inputs, output_dir="out")
        assert find_cases(inputs, output_dir="other")
    for inputs in ("out", "out/*.nii.gz", ["in", "out/**/*"]):
        with pytest.raises(ConfigError, match=r"output_dir=out is the folder of data\.inputs"):
            find_cases(inputs, output_dir="out")
    with pytest.raises(ConfigError, match=r"data\.images\.t1=out/\{subject\}\.nii\.gz names files in output_dir=out"):
        find_cases(None, {"t1": "out/{subject}.nii.gz"}, output_dir="out")
    with pytest.raises(ConfigError, match=r"data\.images\.prior=out/.* names files in output_dir=out"):
        find_cases(None, {"t1": "in/{subject}.nii.gz", "prior": "out/{subject}_labels.nii.gz"}, output_dir="out")


def test_two_stars_skip_the_output_folders_of_other_runs(caplog: pytest.LogCaptureFixture) -> None:
    """Outputs of other runs below the inputs are used only if their folder is named."""
    touch("in/a.nii.gz", "in/run1/a_labels.nii.gz", "in/run1/manifest.csv", "in/run1/run.json")
    touch("in/shards/a_image.nii.gz", "in/shards/manifest_0_of_2.csv", "in/shards/run_0_of_2.json")
    touch("in/derived/b_labels.nii.gz")
    assert ids("in/**/*.nii.gz", "in/run2") == ["a", "b_labels"]
    assert ids("in/run1", "in/run2") == ids("in/run1/*.nii.gz", "in/run2") == ["a_labels"]
    assert "** does not enter folders that runs have written to: in/run1, in/shards" in caplog.text
    with pytest.raises(ConfigError, match=r"matches only outputs of runs, .* such as data\.inputs=in/run1\."):
        find_cases("in/run1/**/*.nii.gz")


def test_a_link_to_a_parent_folder_does_not_duplicate_subjects() -> None:
    """`**` follows the link; one file reached by several paths is one subject."""
    touch("in/a.nii.gz", "in/s/b.nii.gz")
    Path("in/s/up").symlink_to("..")
    assert ids("in/**/*.nii.gz", "out") == ["a", "b"]


# Unusual files


def test_a_broken_link_is_a_subject_that_fails() -> None:
    """It fails when it is read, as does a pipe. Neither is left out silently, by whichever way it is found."""
    touch("s/a.nii.gz")
    Path("s/dangling.nii.gz").symlink_to("annex/key")
    Path("s/loop.nii.gz").symlink_to("loop.nii.gz")
    os.mkfifo("s/pipe.nii.gz")
    Path("s/folder.nii.gz").mkdir()
    everything = ["a", "dangling", "loop", "pipe"]
    assert list(found("s")) == list(found("s/*")) == list(found("s/**/*.nii.gz")) == everything
    assert list(found(None, {"t1": "s/{subject}.nii.gz"})) == ["a", "dangling", "folder", "loop", "pipe"]
    for name in ("dangling", "loop", "pipe"):
        assert list(found(f"s/{name}.nii.gz")) == [name]


def test_a_name_that_is_not_utf_8_is_kept() -> None:
    """With the bytes that the operating system has."""
    Path("s").mkdir()
    with open(b"s/latin\xfc.nii.gz", "wb"):
        pass
    assert [os.fsencode(case.subject) for case in find_cases("s")] == [b"latin\xfc"]


# Folders without NIfTI


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["1.dcm", "2.DCM", "3.dcm"], "in has 3 .dcm (DICOM: dcm2niix"),
        (["a.nrrd", "b.txt"], "in has 1 .nrrd (NRRD: SimpleITK.WriteImage("),
        (["a.mha", "b.mhd", "c.mha"], "in has 2 .mha (MetaImage: SimpleITK.WriteImage("),
        (["brain.mgz"], "in has 1 .mgz (FreeSurfer: mri_convert "),
        (["a.nii.bz2"], "in has 1 .nii.bz2 (NIfTI packed by bzip2: bunzip2 name.nii.bz2)"),
        (["x/1.dcm", "x/2.dcm"], "Folders in it have 2 .dcm (DICOM: dcm2niix"),
        (["x/a.nii.gz", "y/b.nii.gz"], "Folders in it have: data.inputs='in/**/*.nii.gz'."),
        (["x/deeper/a.nii"], "Folders in it have: data.inputs='in/**/*.nii'."),
        (["a/t1.nii.gz", "b/t1.nii.gz"], "have: data.inputs=in data.images='{image: \"{subject}/t1.nii.gz\"}'."),
        (["x/notes.txt"], None),
        ([], None),
    ],
)
def test_a_folder_without_nifti_is_an_error_that_counts_its_files(names: list[str], said: str | None) -> None:
    """By kind, with how to convert them or reach deeper folders; it never suggests what was typed."""
    touch("in/.keep", "inn/a.nii.gz", *[f"in/{name}" for name in names])
    with pytest.raises(ConfigError, match="the folder in has no image file") as error:
        find_cases("in")
    assert "Did you mean" not in str(error.value)
    assert said in str(error.value) if said else str(error.value).endswith(").")
    if said and "data.inputs=" in said:  # it works as it is said
        typed = re.search(r"data\.inputs='?([^' ]+)'?(?: data\.images='(.*)')?\.", str(error.value))
        assert typed is not None
        images = {"image": "{subject}/t1.nii.gz"} if typed[2] else None
        assert len(find_cases(typed[1], images)) == len(names)


def test_dicom_without_an_extension_is_recognised_by_its_content() -> None:
    """As scanners write it."""
    for n in range(3):
        touch(f"in/IM{n}")
        Path(f"in/IM{n}").write_bytes(bytes(128) + b"DICM" + bytes(20))
    touch("in/README")
    with pytest.raises(ConfigError, match=r"in has 3 without an extension \(DICOM: dcm2niix"):
        find_cases("in")


@pytest.mark.parametrize("pattern", ["in/*.nii", "in/*.nii.gz", "in/**/*.nii", "in/x*"])
def test_a_pattern_without_nifti_is_an_error_that_lists_what_is_there(pattern: str) -> None:
    """The files in its folder that the pattern does not match."""
    touch("in/1.dcm", "in/2.dcm")
    with pytest.raises(ConfigError, match=r"no image file matches in.* in has 2 \.dcm \(DICOM: dcm2niix"):
        find_cases(pattern)
    for path in Path("in").iterdir():
        path.unlink()
    touch("in/sub/a.NII.GZ")
    if "gz" not in pattern:
        with pytest.raises(ConfigError, match=r"no image file matches .* There is in/sub/a\.NII\.GZ, for example"):
            find_cases(pattern)


def test_images_of_other_formats_left_out_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    """In one line, though discovery runs several times; files that are not images are not mentioned."""
    touch("mixed/a.nii.gz", "mixed/a.json", "mixed/a.bval", "mixed/b.nrrd", "mixed/c.nrrd", "mixed/d.dcm")
    for _ in range(3):
        assert list(found("mixed")) == ["a"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("data.inputs=mixed: files of other formats are left out: 2 .nrrd (NRRD: ")
    assert ", 1 .dcm (DICOM: " in line
