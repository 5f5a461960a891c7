"""The model under study: loading it, reading its anatomy, and naming its sites."""
