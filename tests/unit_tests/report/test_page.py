"""The template: installed with the package, and safe against what a run is called."""

import configparser
from fnmatch import fnmatch
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

import trinity_megatron
from trinity_megatron.report.history import RunHistory
from trinity_megatron.report.page import TEMPLATE_NAME, render_page
from trinity_megatron.telemetry.tensorboard_log import RunLog

PACKAGE = Path(trinity_megatron.__file__).parent


def test_the_template_is_installed_with_the_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    patterns = setup["options.package_data"]["trinity_megatron"].split()
    template = PACKAGE / "report" / TEMPLATE_NAME
    assert template.is_file()
    name = template.relative_to(PACKAGE).as_posix()
    assert any(fnmatch(name, pattern) for pattern in patterns)
    assert "jinja2" in setup["options"]["install_requires"].split()


def test_a_title_is_text_wherever_it_stands(tmp_path: Path) -> None:
    SummaryWriter(tmp_path).close()
    title = "<script>alert(1)</script> & {{ 7 * 7 }}"
    page = render_page(title, RunHistory(RunLog(tmp_path)), None, [], None)
    escaped = "&lt;script&gt;alert(1)&lt;/script&gt; &amp; {{ 7 * 7 }}"
    assert page.count(escaped) == 2 and "<script" not in page
    assert f"<title>{escaped}</title>" in page and f"<h1>{escaped}</h1>" in page
