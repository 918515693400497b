"""Reports: what was proved, and the pictures that show it, as one self-contained HTML file.

Data in, HTML out. A report knows nothing of how its verdict was reached; it only refuses to print "proved" without a
certificate beside it. jinja2 and matplotlib are imported when a page is written: pip install "soundly[report]".
"""

from .figures import Legend, Picture, heat_limits, heat_overlay
from .html import Certificate, Report, Row, Section, Table, Verdict, render, write_report

__all__ = [
    "Certificate",
    "Legend",
    "Picture",
    "Report",
    "Row",
    "Section",
    "Table",
    "Verdict",
    "heat_limits",
    "heat_overlay",
    "render",
    "write_report",
]
