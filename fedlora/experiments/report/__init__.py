"""From a store of runs to what people read: tables, figures and one page."""
