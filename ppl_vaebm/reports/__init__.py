"""What a person looks at: figures and HTML pages, drawn from arrays and stored results."""
