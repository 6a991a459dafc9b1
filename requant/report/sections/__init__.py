"""The sections of the report page, each from a plan or a record to markup."""
