/* Empty on purpose: bcc has included its own copy of this header already, under another guard. */
