"""Forms of text, each with words for people: ``should match '^[a-z0-9]...'`` tells nobody what to write."""

SOURCE_URI = r"^(hf|s3|pvc|file)://[!-~]+$"
"""Printable ASCII only: Python, Rust and Go disagree on what else is white space."""

STORE_URI = r"^(s3|file)://[!-~]+$"
WEB_URI = r"^https?://[!-~]+$"
URI_PREFIX = r"^(hf|s3|pvc)://[!-~]*$"
STORE_PREFIX = r"^s3://[a-z0-9][a-z0-9.-]*[a-z0-9](/[!-~]*)?$"
ENDPOINT = r"^https?://[A-Za-z0-9\[][A-Za-z0-9.:\[\]-]*(/[!-~]*)?$"
"""An address without a user and a password: everybody may read it."""

HOSTS = r"^[A-Za-z0-9.:*/\[\],_-]+$"
NETWORK = r"^(([0-9]{1,3}\.){3}[0-9]{1,3}/[0-9]{1,2}|[0-9a-f:]*:[0-9a-f:.]*/[0-9]{1,3})$"
MODULE_NAME = "^[A-Za-z0-9_.-]+$"
PRINTABLE = r"^[!-~]+$"
OBJECT_NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
LABEL_NAME = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
LABEL_VALUE = r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"
QUALIFIED_NAME = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
METADATA_NAME = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?|[*])$"
QUANTITY = r"^[+]?([0-9]+[.]?[0-9]*|[.][0-9]*)([numkMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]+)?$"
VARIABLE_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"

_ENDS = "with a letter or digit at both ends"

WORDS: dict[str, str] = {
    WEB_URI: "must be http://HOST/PATH or https://HOST/PATH without spaces",
    URI_PREFIX: "must begin with hf://, s3:// or pvc:// and have no spaces",
    STORE_PREFIX: "must be s3://BUCKET or s3://BUCKET/PREFIX without spaces",
    ENDPOINT: "must be http://HOST:PORT/PATH or https://HOST:PORT/PATH, without spaces, user and password",
    HOSTS: "must be hosts and networks with commas between them, without spaces, such as .svc,10.0.0.0/8",
    NETWORK: "must be a network such as 10.0.0.0/8 or fd00::/8",
    MODULE_NAME: "must be the last part of a module's name, such as q_proj",
    PRINTABLE: "must be letters, digits and signs of ASCII, without spaces",
    OBJECT_NAME: f"must be a-z, 0-9, '-' and '.', {_ENDS}",
    LABEL_NAME: f"must be a-z, 0-9 and '-', {_ENDS}",
    LABEL_VALUE: f"must be empty, or letters, digits, '-', '_' and '.', {_ENDS}",
    QUALIFIED_NAME: f"must be NAME or DOMAIN/NAME: letters, digits, '-', '_' and '.', {_ENDS}",
    METADATA_NAME: "must be NAME, DOMAIN/NAME, DOMAIN/* or *, where NAME has letters, digits, '-', '_' and '.'",
    VARIABLE_NAME: "must be letters, digits and '_', and not begin with a digit",
}
"""What the API server says of a value without that form, behind the path of its field."""

HAVE_RULES = frozenset({SOURCE_URI, STORE_URI})
"""Forms of which a rule says more, so that the schema has no pattern: a cluster has no use for file://."""
