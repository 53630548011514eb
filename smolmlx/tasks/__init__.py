"""The research tasks: their wording, their schemas, and how answers are read; one registry for data, API and scores."""
